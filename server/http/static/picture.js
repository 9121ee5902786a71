// What a model sees in a picture: one request of the protocol, and what its answer means, as `convoy predict` has it.

const COUNTED_CLASSES = 100000;
const SHOWN = 5;
const LEAST_SCORE = 0.5;
const EXPLANATION = "explanation";
const EXPLAIN_CLASS = "explain_class";
const [FAINTEST, STRONGEST] = [0.2, 0.5];

// Python's round(): halves go to the even number.
function rounded(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

function corner(have, want) {
  return have >= want ? -rounded((have - want) / 2) : Math.floor((want - have) / 2);
}

// Where a picture lies in the network's input: its size there, and its top left corner; pairs are x, y.
export function region(preprocess, width, height) {
  const [inputHeight, inputWidth] = preprocess.size;
  const input = [inputWidth, inputHeight];
  if ((preprocess.fit ?? "crop") === "pad") {
    const scale = Math.min(input[0] / width, input[1] / height);
    const resized = [Math.max(1, rounded(width * scale)), Math.max(1, rounded(height * scale))];
    return { image: [width, height], resized, corner: [0, 0], input };
  }
  let resized;
  if (Array.isArray(preprocess.resize) && preprocess.resize.length === 2) {
    resized = [preprocess.resize[1], preprocess.resize[0]];
  } else {
    const shorter = Number(preprocess.resize);
    const longer = Math.trunc((shorter * Math.max(width, height)) / Math.min(width, height));
    resized = height > width ? [shorter, longer] : [longer, shorter];
  }
  return { image: [width, height], resized, corner: [0, 1].map((axis) => corner(resized[axis], input[axis])), input };
}

// A box of the input in pixels of the picture, within it.
export function boxInImage(where, box) {
  return box.map((edge, place) => {
    const axis = place % 2;
    const at = ((edge - where.corner[axis]) * where.image[axis]) / where.resized[axis];
    return Math.min(Math.max(at, 0), where.image[axis]);
  });
}

// For each of `count` places along an axis of the picture the cell of a map that its middle lies in, or -1.
function cellsAlong(where, axis, cells, count) {
  return Array.from({ length: count }, (_, place) => {
    const middle = ((place + 0.5) / count) * where.resized[axis] + where.corner[axis];
    const cell = Math.floor((middle * cells) / where.input[axis]);
    return cell >= 0 && cell < cells ? cell : -1;
  });
}

// A map of the input, of [rows, columns], at `width` x `height` places of the picture; -1 where the network saw nothing.
export function mapInImage(where, map, [rows, columns], width, height) {
  const across = cellsAlong(where, 0, columns, width);
  const down = cellsAlong(where, 1, rows, height);
  const found = new Int32Array(width * height).fill(-1);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      if (down[y] >= 0 && across[x] >= 0) found[y * width + x] = map[down[y] * columns + across[x]];
    }
  }
  return found;
}

// The shares of evidence, 0 to 1, at `width` x `height` places of the picture; -1 where the network saw nothing.
// Between the middles of a map's cells they go over evenly.
export function evidenceInImage(where, map, [rows, columns], width, height) {
  const values = Array.from(map, (value) => (Number.isFinite(value) ? value : 0));
  const most = Math.max(...values, 1e-30);
  const along = (axis, cells, count) =>
    Array.from({ length: count }, (_, place) => {
      const middle = ((place + 0.5) / count) * where.resized[axis] + where.corner[axis];
      if (middle < 0 || middle >= where.input[axis]) return null;
      const at = Math.min(Math.max((middle * cells) / where.input[axis] - 0.5, 0), cells - 1);
      const low = Math.floor(at);
      return [low, Math.min(low + 1, cells - 1), at - low];
    });
  const [across, down] = [along(0, columns, width), along(1, rows, height)];
  const found = new Float32Array(width * height).fill(-1);
  down.forEach((row, y) => {
    across.forEach((column, x) => {
      if (!row || !column) return;
      const [[top, bottom, below], [left, right, beyond]] = [row, column];
      const between = (line) => values[line * columns + left] * (1 - beyond) + values[line * columns + right] * beyond;
      found[y * width + x] = (between(top) * (1 - below) + between(bottom) * below) / most;
    });
  });
  return found;
}

// Red, green, blue and opacity, 0 to 255, of a share of evidence: from blue for little to red for most.
export function evidenceColor(share) {
  const color = [3, 2, 1].map((place) => Math.round(255 * Math.min(Math.max(1.5 - Math.abs(4 * share - place), 0), 1)));
  return [...color, Math.round(255 * (FAINTEST + (STRONGEST - FAINTEST) * share))];
}

// Pascal VOC's colour of a class: the bits of its index go to red, green and blue in turn, highest first.
export function vocColor(index) {
  const channels = [0, 0, 0];
  for (let bit = 0; bit < 24; bit += 1) channels[bit % 3] |= ((index >> bit) & 1) << (7 - Math.floor(bit / 3));
  return channels;
}

// A bright colour for a class, far from those of the classes next to it.
export function boxColor(index) {
  const hue = ((index * 0.618034) % 1) * 6;
  return [5, 3, 1].map((shift) => {
    const at = (shift + hue) % 6;
    return Math.round(255 * (1 - 0.85 * Math.max(0, Math.min(at, 4 - at, 1))));
  });
}

// "value:index" or "value:index:label", best first, to probabilities where the model's config names an activation.
export function predictions(texts, activation) {
  const parts = texts.map((text) => /^([^:]*):([0-9]+)(?::([^]*))?$/.exec(text));
  let values = parts.map((part) => Number(part[1].replace(/^(-?)(inf|nan)$/, (_, sign, word) => sign + { inf: "Infinity", nan: "NaN" }[word])));
  if (activation === "softmax") {
    const largest = Math.max(...values.slice(0, 1));
    const powers = values.map((value) => Math.exp(value - largest));
    const sum = powers.reduce((total, power) => total + power, 0);
    values = powers.map((power) => power / sum);
  } else if (activation === "sigmoid") {
    values = values.map((value) => 1 / (1 + Math.exp(-value)));
  }
  return parts.map((part, place) => ({ index: Number(part[2]), label: part[3] ?? part[2], value: values[place] }));
}

function labelsOf(config) {
  try {
    return JSON.parse(config.parameters?.labels?.string_value ?? "[]").map(String);
  } catch {
    return [];
  }
}

const TYPES = {
  BOOL: Uint8Array, UINT8: Uint8Array, INT8: Int8Array, UINT16: Uint16Array, INT16: Int16Array, UINT32: Uint32Array,
  INT32: Int32Array, UINT64: BigUint64Array, INT64: BigInt64Array, FP32: Float32Array, FP64: Float64Array,
};

// The outputs of one request with an encoded picture, by name: their shapes, and data as lists or arrays.
async function infer(send, path, config, file, outputs, others = []) {
  const bytes = await file.arrayBuffer();
  const { name } = config.input.find((tensor) => !tensor.optional);
  const input = { name, datatype: "BYTES", shape: config.max_batch_size > 0 ? [1, 1] : [1] };
  input.parameters = { binary_data_size: 4 + bytes.byteLength };
  const head = new TextEncoder().encode(JSON.stringify({ inputs: [input, ...others], outputs }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, bytes.byteLength, true);
  const headers = { "Inference-Header-Content-Length": String(head.length), "Content-Type": "application/octet-stream" };
  const response = await send(`${path}/infer`, { method: "POST", headers, body: new Blob([head, length, bytes]) });
  const answer = await response.arrayBuffer();
  const end = Number(response.headers.get("Inference-Header-Content-Length") ?? answer.byteLength);
  const document = JSON.parse(new TextDecoder().decode(answer.slice(0, end)));
  let at = end;
  const found = {};
  for (const output of document.outputs) {
    const size = output.parameters?.binary_data_size;
    if (size !== undefined) {
      const kind = TYPES[output.datatype];
      if (kind === undefined) throw new Error(`this page cannot read output '${output.name}', which is ${output.datatype}`);
      output.data = Array.from(new kind(answer.slice(at, at + size)), Number);
      at += size;
    }
    found[output.name] = output;
  }
  return found;
}

// What draws the evidence of an answer over a picture of `size`.
function heat(config, output, size) {
  const where = region(JSON.parse(config.parameters.preprocess.string_value), ...size);
  const draw = drawn(size);
  const shares = evidenceInImage(where, output.data, output.shape.slice(-2), ...draw);
  return (canvas) => {
    [canvas.width, canvas.height] = draw;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(...draw);
    shares.forEach((share, place) => {
      if (share >= 0) pixels.data.set(evidenceColor(share), 4 * place);
    });
    context.putImageData(pixels, 0, 0);
  };
}

function told(output, label) {
  const some = Array.from(output.data).some((value) => value > 0);
  return some ? `The colours say where the evidence for ${label} lies, from blue for little to red for most.` : `Nothing in the picture is evidence for ${label}.`;
}

async function classify(send, path, config, file, size) {
  const { name, dims } = config.output[0];
  const count = dims.every((dim) => dim > 0) ? dims.reduce((product, dim) => product * dim, 1) : COUNTED_CLASSES;
  const activation = config.parameters?.activation?.string_value || "none";
  const explains = config.output.some((output) => output.name === EXPLANATION);
  const map = { name: EXPLANATION, parameters: { binary_data: true } };
  // Softmax needs all of the classes.
  const answer = await infer(send, path, config, file, [{ name, parameters: { classification: count } }, ...(explains ? [map] : [])]);
  const entries = predictions(answer[name].data, activation).slice(0, SHOWN);
  const most = Math.max(...entries.map((entry) => Math.abs(entry.value)), Number.MIN_VALUE);
  const isShare = activation !== "none";
  for (const entry of entries) {
    entry.share = isShare ? entry.value : Math.max(0, entry.value) / most;
    entry.text = isShare ? percent(entry.value) : entry.value.toPrecision(4);
  }
  const kind = isShare ? "probability" : "bare output: the model's config names no activation";
  const summary = `The ${entries.length} best classes, with their ${kind}.`;
  if (!explains) return { entries, summary };
  const explain = async ({ index, label }) => {
    const other = { name: EXPLAIN_CLASS, datatype: "INT64", shape: [1, 1], data: [index] };
    const { [EXPLANATION]: output } = await infer(send, path, config, file, [map], [other]);
    return { overlay: heat(config, output, size), evidence: told(output, label) };
  };
  const asks = config.input.some((input) => input.name === EXPLAIN_CLASS);
  return {
    entries, summary, overlay: heat(config, answer[EXPLANATION], size), evidence: told(answer[EXPLANATION], entries[0].label),
    ...(asks ? { explain } : {}),
  };
}

async function segment(send, path, config, file, size) {
  const answer = await infer(send, path, config, file, [{ name: "classes", parameters: { binary_data: true } }]);
  const labels = labelsOf(config);
  const where = region(JSON.parse(config.parameters.preprocess.string_value), ...size);
  const shape = answer.classes.shape.slice(-2);
  const draw = drawn(size);
  const classes = mapInImage(where, answer.classes.data, shape, ...draw);
  const counts = new Map();
  let seen = 0;
  for (const index of classes) {
    if (index >= 0) {
      counts.set(index, (counts.get(index) ?? 0) + 1);
      seen += 1;
    }
  }
  const entries = [...counts].map(([index, count]) => ({
    index, label: labels[index] ?? String(index), share: count / seen, text: percent(count / seen), color: vocColor(index),
  }));
  entries.sort((one, other) => other.share - one.share);
  const clear = new Set(entries.filter((entry) => /^_*background_*$/i.test(entry.label.trim())).map((entry) => entry.index));
  for (const entry of entries) if (clear.has(entry.index)) entry.color = null;
  const overlay = (canvas) => {
    [canvas.width, canvas.height] = draw;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(...draw);
    classes.forEach((index, place) => {
      if (index >= 0 && !clear.has(index)) pixels.data.set([...vocColor(index), 140], 4 * place);
    });
    context.putImageData(pixels, 0, 0);
  };
  return { entries, overlay, summary: "Classes, with the share of the pixels that each has." };
}

async function detect(send, path, config, file, size) {
  const names = ["boxes", "scores", "labels", "count"];
  const answer = await infer(send, path, config, file, names.map((name) => ({ name })));
  const labels = labelsOf(config);
  const where = region(JSON.parse(config.parameters.preprocess.string_value), ...size);
  const boxes = answer.boxes.data.flat();
  const all = Array.from({ length: Number(answer.count.data[0]) }, (_, place) => {
    const index = Number(answer.labels.data[place]);
    const score = Number(answer.scores.data[place]);
    const box = boxInImage(where, boxes.slice(4 * place, 4 * place + 4).map(Number));
    const text = `left ${Math.round(box[0])}, top ${Math.round(box[1])}, right ${Math.round(box[2])}, bottom ${Math.round(box[3])}`;
    return { index, label: labels[index] ?? String(index), share: score, text: score.toFixed(2), box, place: text, color: boxColor(index) };
  }).filter(({ box }) => box[0] < box[2] && box[1] < box[3]);
  all.sort((one, other) => other.share - one.share);
  const entries = all.filter((entry) => entry.share >= LEAST_SCORE);
  const overlay = (canvas) => {
    const draw = drawn(size);
    [canvas.width, canvas.height] = draw;
    const [x, y] = [draw[0] / size[0], draw[1] / size[1]];
    const context = canvas.getContext("2d");
    const pixel = draw[0] / (canvas.clientWidth || draw[0]); // of the screen
    const unit = 2 * pixel;
    const letters = 13 * pixel;
    context.lineWidth = unit;
    context.font = `600 ${letters}px system-ui, sans-serif`;
    context.textBaseline = "top";
    for (const { box, label, text, color } of [...entries].reverse()) {
      const [left, top, right, bottom] = [box[0] * x, box[1] * y, box[2] * x, box[3] * y];
      context.strokeStyle = context.fillStyle = `rgb(${color.join()})`;
      context.strokeRect(left + unit / 2, top + unit / 2, Math.max(1, right - left - unit), Math.max(1, bottom - top - unit));
      const caption = `${label} ${text}`;
      const high = 1.4 * letters;
      const wide = context.measureText(caption).width + 8 * pixel;
      const at = [Math.max(0, Math.min(left, draw[0] - wide)), top >= high ? top - high : top];
      context.fillRect(...at, wide, high);
      context.fillStyle = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 128 ? "#000" : "#fff";
      context.fillText(caption, at[0] + 4 * pixel, at[1] + 0.2 * letters);
    }
  };
  const left = all.length - entries.length;
  const found = entries.length === 1 ? "1 object" : `${entries.length} objects`;
  return { entries, overlay, summary: `${found} with a score of ${LEAST_SCORE} or more, and ${left} with less. Places are in pixels.` };
}

// Overlays of large pictures are drawn coarser, those of small ones finer.
function drawn([width, height]) {
  const longer = Math.max(width, height);
  const scale = Math.min(Math.max(longer, 720), 1600) / longer;
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(share < 0.1 ? 2 : 1)} %` : "no number";
}

const TASKS = { "": classify, classification: classify, segmentation: segment, detection: detect };

// Whether this page shows what models of a task say.
export function knows(task) {
  return task in TASKS;
}

// What a model sees in a file of `size` [width, height]: entries, best first, a sentence, and what draws on a canvas; of
// one that explains its answer also where the evidence is, in a sentence, and what asks for that of another entry.
export function ask(send, path, config, file, size) {
  return TASKS[config.parameters?.task?.string_value ?? ""](send, path, config, file, size);
}

// Asks a Convoy server two things: what it makes of a tensor, and what it sees in a JPEG.
//
//   node classify.js PROTOS ADDRESS IMAGE [AUTHORITY.pem]
//
// PROTOS is the folder that has convoynet/protos. With a certificate authority it speaks TLS, and then sends the token in
// CONVOY_TOKEN, if there is one.
"use strict";
const fs = require("fs");
const path = require("path");
const grpc = require("@grpc/grpc-js");
const protoLoader = require("@grpc/proto-loader");

const MODEL = "resnet50";
const TIMEOUT_MS = 10_000;
const MOST = 64 * 2 ** 20; // bytes of an answer, where gRPC's own limit is 4 MB, and of a request that is sent again

// What a server refuses since it is stopping, or never saw, is asked again, of the next server where there are several.
const RETRIES = {
  methodConfig: [
    {
      name: [{ service: "inference.GRPCInferenceService" }],
      retryPolicy: {
        maxAttempts: 4,
        initialBackoff: "0.1s",
        maxBackoff: "2s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
};

/** A client, which any number of calls may share at once. */
function connect(protos, address, authority) {
  const definition = protoLoader.loadSync("convoynet/protos/inference/grpc_service.proto", {
    includeDirs: [protos],
    keepCase: true,
    longs: Number,
  });
  const { GRPCInferenceService } = grpc.loadPackageDefinition(definition).inference;
  let credentials = grpc.credentials.createInsecure();
  if (authority) {
    credentials = grpc.credentials.createSsl(fs.readFileSync(authority));
    if (process.env.CONVOY_TOKEN) credentials = withToken(credentials, process.env.CONVOY_TOKEN);
  }
  return new GRPCInferenceService(address, credentials, {
    "grpc.service_config": JSON.stringify(RETRIES),
    "grpc.max_receive_message_length": MOST,
    "grpc.per_rpc_retry_buffer_size": MOST,
    // Finds out within 40 s that the server's machine is gone.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
  });
}

/** Credentials that send a token with every call. */
function withToken(credentials, token) {
  const metadata = new grpc.Metadata();
  metadata.set("authorization", `Bearer ${token}`);
  const call = grpc.credentials.createFromMetadataGenerator((_, done) => done(null, metadata));
  return grpc.credentials.combineChannelCredentials(credentials, call);
}

/** One call, as a promise; the server drops it when its time is over. */
function call(client, method, request, timeout = TIMEOUT_MS) {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + timeout };
    client[method](request, options, (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

async function waitUntilReady(client) {
  const end = Date.now() + 60_000;
  await new Promise((resolve, reject) => client.waitForReady(end, (error) => (error ? reject(error) : resolve())));
  while (!(await call(client, "ModelReady", { name: MODEL })).ready) {
    if (Date.now() > end) throw new Error(`${MODEL} is not ready`);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

/** Sends the tensor that the model takes, row by row. */
async function infer(client, values, shape) {
  const answer = await call(client, "ModelInfer", {
    model_name: MODEL,
    inputs: [{ name: "input", datatype: "FP32", shape }],
    outputs: [{ name: "logits" }],
    raw_input_contents: [Buffer.from(values.buffer, values.byteOffset, values.byteLength)],
  });
  const [raw] = answer.raw_output_contents;
  return new Float32Array(Uint8Array.from(raw).buffer); // a copy, which begins where floats may
}

/** Sends the file as it is; the server decodes it, and answers with "score:index:label", best first. */
async function classify(client, image, count) {
  const answer = await call(client, "ModelInfer", {
    model_name: MODEL,
    inputs: [{ name: "input", datatype: "BYTES", shape: [1, 1], contents: { bytes_contents: [image] } }],
    outputs: [{ name: "logits", parameters: { classification: { int64_param: count } } }],
  });
  const [raw] = answer.raw_output_contents;
  const found = [];
  for (let at = 0; at < raw.length; ) {
    const end = at + 4 + raw.readUInt32LE(at); // of each element its length, and its bytes
    const [score, index, ...label] = raw.toString("utf8", at + 4, end).split(":");
    found.push(`${label.join(":")} (${index}) ${score}`);
    at = end;
  }
  return found;
}

async function main([protos, address, image, authority]) {
  if (!image) {
    console.error("usage: node classify.js PROTOS ADDRESS IMAGE [AUTHORITY.pem]");
    process.exit(2);
  }
  const client = connect(protos, address, authority);
  await waitUntilReady(client);
  const grey = new Float32Array(3 * 224 * 224).fill(0.5); // a grey image, as the network takes it
  const logits = await infer(client, grey, [1, 3, 224, 224]);
  console.log(`grey: ${logits.length} logits, the first is ${logits[0].toFixed(3)}`);
  for (const line of await classify(client, fs.readFileSync(image), 3)) {
    console.log(`${path.basename(image)}: ${line}`);
  }
  client.close();
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.code in grpc.status ? `${grpc.status[error.code]}: ${error.details}` : error.message);
  process.exit(1);
});

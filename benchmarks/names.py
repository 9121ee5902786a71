"""The names of timm and torchvision: are they exported, in INT8 too, and how close to PyTorch?

    python benchmarks/names.py --save                  the networks of NETWORKS, half a minute or so each on a core
    python benchmarks/names.py timm:ghostnet_100       one

None of them is in the zoo. Seeded random weights whose batch statistics are estimated, made images, small pictures
where the network takes them: this says whether graphs and quantization are right, and nothing about accuracy. Each is
one INT8 export for CPUs in a process of its own, on one thread. What it says when it refuses is the reason in the
table, and the network is exported in float32 then.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import convoynet

RESULTS = Path(__file__).parent / "results"
FORK = multiprocessing.get_context("fork")
LIMIT_S = 1800
# One or two of a family, its smallest; the size of the image where the network takes a smaller one than its own.
NETWORKS: dict[str, int | None] = {
    "timm:bat_resnext26ts": None,
    "timm:botnet26t_256": 128,
    "timm:coat_lite_tiny": None,
    "timm:coatnet_nano_rw_224": None,
    "timm:convit_tiny": None,
    "timm:convmixer_768_32": 96,
    "timm:convnext_atto": 96,
    "timm:convnextv2_atto": 96,
    "timm:crossvit_tiny_240": None,
    "timm:cs3darknet_s": 128,
    "timm:cspresnet50": 96,
    "timm:davit_tiny": 128,
    "timm:deit_tiny_patch16_224": None,
    "timm:dla34": 96,
    "timm:dla46x_c": 96,
    "timm:dpn48b": 96,
    "timm:eca_resnet33ts": 96,
    "timm:edgenext_xx_small": 128,
    "timm:efficientformer_l1": None,
    "timm:efficientvit_b0": 128,
    "timm:efficientvit_m0": None,
    "timm:ese_vovnet19b_dw": 96,
    "timm:fastvit_t8": 128,
    "timm:fbnetc_100": 96,
    "timm:focalnet_tiny_srf": 128,
    "timm:gcresnet33ts": 96,
    "timm:gernet_s": 96,
    "timm:ghostnet_050": 96,
    "timm:ghostnetv2_100": 96,
    "timm:haloregnetz_b": None,
    "timm:hardcorenas_a": 96,
    "timm:hgnetv2_b0": 96,
    "timm:hrnet_w18_small": 96,
    "timm:inception_next_atto": 96,
    "timm:lambda_resnet26t": 128,
    "timm:lcnet_035": 96,
    "timm:legacy_seresnet18": 96,
    "timm:levit_128s": None,
    "timm:mambaout_femto": 96,
    "timm:maxvit_nano_rw_256": None,
    "timm:mixer_s32_224": None,
    "timm:mixnet_s": 96,
    "timm:mobileone_s0": 96,
    "timm:mobilenetv4_conv_small_035": 96,
    "timm:mobilevit_xxs": 128,
    "timm:mobilevitv2_050": 128,
    "timm:mvitv2_tiny": None,
    "timm:nf_regnet_b0": 96,
    "timm:pit_ti_224": None,
    "timm:poolformer_s12": 96,
    "timm:pvt_v2_b0": 96,
    "timm:regnetz_b16": 96,
    "timm:repghostnet_050": 96,
    "timm:repvgg_a0": 96,
    "timm:repvit_m0_9": 96,
    "timm:res2net50_14w_8s": 96,
    "timm:resnest14d": 96,
    "timm:resnetv2_50": 96,
    "timm:rexnet_100": 96,
    "timm:selecsls42": 96,
    "timm:semnasnet_050": 96,
    "timm:skresnet18": 96,
    "timm:starnet_s1": 96,
    "timm:swin_tiny_patch4_window7_224": None,
    "timm:swiftformer_xs": None,
    "timm:tf_efficientnetv2_b0": 96,
    "timm:tiny_vit_5m_224": None,
    "timm:tinynet_e": 106,
    "timm:tresnet_m": 96,
    "timm:vit_tiny_patch16_224": 96,
    "timm:visformer_tiny": None,
    "timm:volo_d1_224": None,
    "timm:xcit_nano_12_p16_224": 96,
    "torchvision:convnext_tiny": 96,
    "torchvision:maxvit_t": None,
    "torchvision:regnet_y_400mf": 96,
    "torchvision:swin_t": 96,
    "torchvision:vit_b_32": None,
}


def main() -> int:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(NETWORKS), help="networks (default: all of NETWORKS)")
    parser.add_argument("--save", action="store_true", help="write results/names.md; with names, renew their rows")
    options = parser.parse_args()
    file = RESULTS / "names.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if options.save and file.exists() else {}
    import_all()
    for name in options.names:
        rows[name] = measure(name, NETWORKS.get(name))
        print(line(name, rows[name]), flush=True)
        if options.save:
            file.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
            file.with_suffix(".md").write_text(table(rows))
    return 0


def measure(name: str, size: int | None) -> dict[str, Any]:
    """One export's figures; where INT8 is refused the reason, and the figures of the same network in float32."""
    begun = time.monotonic()
    report, reason = export(name, size, int8=True, calibration_samples=32, made_images="noise")
    found: dict[str, Any] = {"size": size}
    if report is None:
        found["refused"] = reason
        report, float_reason = export(name, size)
        if report is None:
            return found | {"float_refused": float_reason}
    else:
        found |= {"int8_db": report["parity"]["sqnr_db"], "int8_error": report["parity"]["spread"]["error"]}
        macs = (report["arithmetic"] or {"macs": {}})["macs"]  # of a graph whose shapes are all known
        found["int8_share"] = macs.get("int8", 0) / sum(macs.values()) if macs else None
    stages = {stage["stage"]: stage["parity"] for stage in report["stages"]}
    return found | {
        "size": report["input"]["shape"][-1],
        "parameters": report["parameters"]["after"],
        "macs": report["macs"]["after"],
        "exact_error": stages["onnx"]["max_rel_error"],
        "engines": {engine["engine"]: engine["excluded"] for engine in report["engines"]},
        "seconds": round(time.monotonic() - begun),
    }


def export(name: str, size: int | None, **options: Any) -> tuple[dict[str, Any] | None, str]:
    """The report of one export, or None and why there is none, from a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_export, args=(sender, name, size, options))
    child.start()
    sender.close()
    try:
        if not receiver.poll(LIMIT_S):
            return None, f"not done after {LIMIT_S} s"
        said: tuple[dict[str, Any] | None, str] = receiver.recv()
        return said
    except EOFError:
        child.join()
        return None, f"the process ended with {child.exitcode}"
    finally:
        child.kill()
        child.join()


def _export(sender: Connection, name: str, size: int | None, options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = {"model_repository": folder, "name": "network", "weights": "random", "target": "cpu"}
        try:
            published = convoynet.export(name, input_size=size, **where, **options)
        except convoynet.ConvoyError as error:
            sender.send((None, str(error)))
            return
        sender.send((json.loads((published.path.parent / "report.json").read_text()), ""))


def import_all() -> None:
    """Import what an export imports on its way, once: in each process it would take as long as a small network does."""
    import openvino  # noqa: F401
    import timm  # noqa: F401
    import torch

    from convoynet.exporter.data.images import Preprocess
    from convoynet.exporter.evidence import speed
    from convoynet.exporter.graph.onnx_from_torch import onnx_from_torch
    from convoynet.exporter.pipeline import pipeline  # noqa: F401

    torch.set_num_threads(1)  # nothing may be left running where a process is forked
    speed.MIN_ROUNDS = speed.MAX_ROUNDS = 1  # nobody looks at the speed
    onnx_from_torch(torch.nn.Conv2d(1, 1, 1), Preprocess((8, 8), 8, (0.5,), (0.5,)), uint8_input=False)


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    reasons = [row[key] for key in ("refused", "float_refused") if key in row]
    if "float_refused" in row:
        return f"| `{name}` | {row['size'] or ''} | | | | | {'; in float32: '.join(reasons)} |"
    network = f"| `{name}` | {row['size']} | {row['parameters'] / 1e6:.1f} | {row['exact_error']:.0e}"
    if reasons:
        return f"{network} | | | float32 alone: {reasons[0].partition(' (in ')[0]} |"
    ratio = "no signal" if row["int8_db"] is None else f"{row['int8_db']:.1f}"  # weights that begin as zeros
    share = "not counted" if row["int8_share"] is None else f"{row['int8_share']:.1%}"
    served = [engine for engine, excluded in row["engines"].items() if not excluded]
    left_out = [f"not {engine}: {excluded}" for engine, excluded in row["engines"].items() if excluded]
    return f"{network} | {ratio} | {share} | {'; '.join([', '.join(served), *left_out])} |"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results for people."""
    good = [row for row in rows.values() if "refused" not in row]
    head = (
        "# Networks by the names of their libraries\n\n"
        f"`python benchmarks/names.py --save`: {len(good)} of {len(rows)} are exported in INT8 and published. Seeded"
        " random weights, made images.\n\n"
        "| network | pixels | M parameters | float32: largest error | INT8, dB | multiply-adds in INT8 "
        "| served by, or why not |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(line(name, row) for name, row in sorted(rows.items())) + "\n"


if __name__ == "__main__":
    sys.exit(main())

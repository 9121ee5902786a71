"""Container images on machines that may reach no registry and may raise no limits."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = "localhost/convoy-base:bookworm"


def limits() -> list[str]:
    """Flags for `podman run` and `podman build`: a container's own default limits may be above what we may have."""
    flags = []
    for name, enough in (("nofile", 16384), ("nproc", 4096)):
        hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1]
        limit = enough if hard == resource.RLIM_INFINITY else min(hard, enough)
        flags.append(f"--ulimit={name}={limit}:{limit}")
    return [*flags, "--network=host"]


def podman(program: str) -> list[str]:
    """The command, with runc where there is one: it needs less of the machine than crun."""
    return [program, "--runtime", "runc"] if shutil.which("runc") else [program]


def base_image(program: str) -> str | None:
    """CONVOY_BASE_IMAGE, the one made before, or one that is made now; None where none can be."""
    if named := os.environ.get("CONVOY_BASE_IMAGE"):
        return named
    if subprocess.run([program, "image", "exists", BASE], check=False).returncode == 0:
        return BASE
    if os.geteuid() != 0 or shutil.which("mmdebstrap") is None:
        return None
    script = ROOT / "deploy" / "docker" / "base-image.sh"
    subprocess.run([script, BASE], check=True, env={**os.environ, "CONTAINER": program})
    return BASE


def secrets(folder: Path) -> list[str]:
    """How pip reaches its index from here, given to the build alone: flags for `podman build`."""
    bundle = next((os.environ[n] for n in ("PIP_CERT", "SSL_CERT_FILE") if n in os.environ), None)
    index = os.environ.get("PIP_INDEX_URL")
    lines = ["[global]", "timeout = 180", *([f"index-url = {index}"] if index else [])]
    if bundle:
        lines.append("cert = /run/secrets/ca_bundle")
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    found = [f"--secret=id=pip_conf,src={folder / 'pip.conf'}"]
    return [*found, f"--secret=id=ca_bundle,src={bundle}"] if bundle else found


def build(program: str, base: str, folder: Path) -> str:
    """Builds the CPU server's image and returns its name; layers that are there already are taken as they are."""
    name = "localhost/convoy:cpu"
    # Docker's format: HEALTHCHECK is none of OCI's.
    flags = ["--format=docker", f"--build-arg=BASE_IMAGE={base}", f"--tag={name}", *limits(), *secrets(folder)]
    file = "--file=deploy/docker/server.Dockerfile"
    subprocess.run([*podman(program), "build", *flags, file, "."], cwd=ROOT, check=True)
    return name

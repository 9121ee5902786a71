#!/bin/sh
# A base image for deploy/docker made of Debian 12's own packages, for where no registry can be reached:
#   deploy/docker/base-image.sh convoy-base:bookworm
#   docker build --build-arg BASE_IMAGE=convoy-base:bookworm ...
# As root, with mmdebstrap; CONTAINER is docker (or podman), which keeps the image.
set -eu
name=${1:-convoy-base:bookworm}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mmdebstrap --variant=essential --include=python3,python3-venv,libstdc++6,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    bookworm "$folder/base.tar"
"${CONTAINER:-docker}" import "$folder/base.tar" "$name"

#!/bin/sh
# Builds what of ovms is no Python, each from its one source: src/ovms/vmm/watch/watch, src/ovms/runtime/fence/fence and
# src/ovms/vmm/freeze/freeze.so.
# The results are part of the repository, so that nobody needs a compiler to use ovms; tests tell when one is older than
# its source.
#
#   scripts/build-native.sh [WATCH [FENCE [FREEZE]]]     other places for the results
set -eu
source=$(cd "$(dirname "$0")/../src/ovms" && pwd)

# build SOURCE RESULT FLAG...: no C library, nothing of the host: the same compiler gives the same bytes anywhere
build() {
    from=$1 to=$2
    shift 2
    digest=$(sha256sum "$from" | cut -d ' ' -f 1)
    ${CC:-gcc} -std=gnu11 -Wall -Wextra -Werror -Os -ffreestanding -fno-tree-loop-distribute-patterns \
        -fno-stack-protector -fno-asynchronous-unwind-tables -fno-ident -nostdlib -mno-sse "$@" \
        -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,norelro -Wl,-z,noseparate-code -s \
        "-DSOURCE_DIGEST=\"$digest\"" -o "$to" "$from"
}

build "$source/vmm/watch/watch.c" "${1:-$source/vmm/watch/watch}" -fno-pic -no-pie -static
build "$source/runtime/fence/fence.c" "${2:-$source/runtime/fence/fence}" -fno-pic -no-pie -static
build "$source/vmm/freeze/freeze.c" "${3:-$source/vmm/freeze/freeze.so}" -fpic -shared

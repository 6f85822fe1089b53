#!/bin/sh
# Builds what of ovms is no Python: src/ovms/vmm/watch/watch and src/ovms/runtime/fence/fence, each from its one source.
# The results are part of the repository, so that nobody needs a compiler to use ovms; tests tell when one is older than
# its source.
#
#   scripts/build-native.sh [WATCH [FENCE]]     other places for the results
set -eu
source=$(cd "$(dirname "$0")/../src/ovms" && pwd)

# build SOURCE RESULT: no C library, nothing of the host: the same compiler gives the same bytes anywhere
build() {
    digest=$(sha256sum "$1" | cut -d ' ' -f 1)
    ${CC:-gcc} -std=gnu11 -Wall -Wextra -Werror -Os -ffreestanding -fno-tree-loop-distribute-patterns \
        -fno-stack-protector -fno-asynchronous-unwind-tables -fno-ident -fno-pic -no-pie -static -nostdlib -mno-sse \
        -Wl,--build-id=none -Wl,-z,noexecstack -Wl,-z,norelro -Wl,-z,noseparate-code -s \
        "-DSOURCE_DIGEST=\"$digest\"" -o "$2" "$1"
}

build "$source/vmm/watch/watch.c" "${1:-$source/vmm/watch/watch}"
build "$source/runtime/fence/fence.c" "${2:-$source/runtime/fence/fence}"

#!/usr/bin/env bash
# A ROCM_HOME that compiles and links, but cannot run: hipcc is clang from Debian's archive, HIP's headers and AMD's device
# libraries are unpacked, not installed, and libamdhip64.so is empty. Prints the folder; fails with a sentence where it
# cannot be had. Kept in build/amd/rocm or the folder given, and made once for each version below.
#   ROCM_HOME=$(tests/amd/toolchain.sh) FLASH_EXT_DEVICE=rocm pip install .
set -euo pipefail
hip=libamdhip64-dev=6.4.3-5 devicelibs=rocm-device-libs-21=7.0.2+dfsg-3 suite=sid # bitcode of LLVM 21: any later clang reads it
clangs="25 24 23 22 21"

fail() {
  echo "no AMD toolchain: $*" >&2
  exit 1
}
find_clang() {
  for llvm in $clangs; do
    command -v clang++-$llvm ld.lld-$llvm llvm-readelf-$llvm clang-offload-bundler-$llvm > /dev/null && return
  done
  false
}

home=$(realpath -m "${1:-$(dirname "$0")/../../build/amd/rocm}")
[ -f "$home/$hip,$devicelibs" ] && echo "$home" && exit
mkdir -p "$home"
exec 3>&1 1>&2 # all but the answer goes to stderr

[ "$(dpkg --print-architecture 2> /dev/null)" = amd64 ] || fail "it is made of Debian packages for amd64; set ROCM_HOME yourself"
if ! find_clang; then
  [ "$(id -u)" = 0 ] || fail "clang 21 or newer with lld, llvm and clang-tools is not installed"
  apt-get update -qq
  for llvm in $clangs; do
    apt-get install -y -qq --no-install-recommends {clang,lld,llvm,clang-tools}-$llvm 2> /dev/null && break
  done
  find_clang || fail "apt has no clang 21 or newer"
fi

# The two packages from another suite of the machine's own mirror, in lists of our own.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 -E '/debian/?$' || echo http://deb.debian.org/debian)
apt="$home/apt"
mkdir -p "$apt"/{lists/partial,cache/archives/partial} "$home/root"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$apt/sources.list"
apt_get() {
  apt-get -qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$apt/lists" \
    -o Dir::Cache="$apt/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User="$(id -un)" "$@"
}
apt_get update || fail "$mirror cannot be reached"
for package in $hip $devicelibs; do
  (cd "$apt" && { apt_get download $package || apt_get download ${package%%=*}; }) || fail "$mirror has no ${package%%=*}"
done
for file in "$apt"/*.deb; do
  echo "using $(basename "$file")"
  dpkg -x "$file" "$home/root"
done
rm -rf "$apt"

version=$(sed -nE 's/^#define HIP_VERSION_(MAJOR|MINOR) +([0-9]+)/\2/p' "$home"/root/usr/include/hip/hip_version.h | paste -sd.)
ln -sfn "$(dirname "$(find "$home/root" -name ocml.bc)")" "$home/bitcode"
ln -sfn root/usr/include "$home/include"
mkdir -p "$home"/{bin,lib}
ln -sfn "$(command -v llvm-readelf-$llvm)" "$home/bin/llvm-readelf"
cat > "$home/wavesize.h" << 'EOF'
// LLVM 21 dropped this macro, HIP 6.4's headers use it.
#ifndef __AMDGCN_WAVEFRONT_SIZE
#if defined(__GFX10__) || defined(__GFX11__) || defined(__GFX12__)
#define __AMDGCN_WAVEFRONT_SIZE 32
#else
#define __AMDGCN_WAVEFRONT_SIZE 64
#endif
#endif
EOF
cat > "$home/bin/hipcc" << EOF
#!/bin/sh
[ "\$1" = --version ] && echo "HIP version: $version" && exec clang++-$llvm --version
exec clang++-$llvm -x hip --rocm-path=$home/root/usr --rocm-device-lib-path=$home/bitcode \\
  -isystem $home/include -include $home/wavesize.h "\$@"
EOF
chmod +x "$home/bin/hipcc"
clang-$llvm -shared -o "$home/lib/libamdhip64.so" -x c /dev/null
touch "$home/$hip,$devicelibs"
echo "$home" >&3

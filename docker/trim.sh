#!/bin/sh
# Takes out of a virtual environment what nothing in an image opens: packages' tests, archives for a linker, torch's
# headers (there is no compiler), and CUDA libraries that no other file names.
set -eu
site=$(echo "$1"/lib/python3*/site-packages)
echo "$site: $(du -sm "$site" | cut -f1) MB as installed"
find "$site" -type d -name tests -prune -exec rm -rf {} +
find "$site" -type f -name '*.a' -delete
rm -rf "$site"/torch/include "$site"/torch/bin/protoc*
rm -f "$site"/nvidia/cu13/lib/libcusolverMg.so* "$site"/nvidia/cu13/lib/libcufftw.so* "$site"/nvidia/cu13/lib/libnvblas.so* \
  "$site"/nvidia/cu13/lib/libnvrtc*.alt.so*
echo "$site: $(du -sm "$site" | cut -f1) MB trimmed"

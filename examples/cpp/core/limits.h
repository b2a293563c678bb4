// How large what a bundle describes may be: those of torchtrt_md/bundle/limits.py.
#pragma once

#include <cstdint>

namespace mdtrt {

inline constexpr int64_t kMaxManifestBytes = int64_t{256} << 20;
inline constexpr int64_t kMaxRanks = 4096;
inline constexpr size_t kMaxAxes = 16;
inline constexpr size_t kMaxDims = 64;
inline constexpr int64_t kMaxTensorBytes = int64_t{1} << 40;
inline constexpr int kMaxDepth = 64;                           // of what a model returns
inline constexpr int64_t kMaxHeaderBytes = int64_t{100} << 20; // of a safetensors file, as its own library has it

} // namespace mdtrt

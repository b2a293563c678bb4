// Dtypes, by PyTorch's names of them.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mdtrt {

struct DTypeInfo {
    std::string_view name;        // PyTorch's
    int itemsize;                 // bytes of an element
    std::string_view safetensors; // the format's name, "" where it has none
};
using DType = const DTypeInfo*; // one object for each dtype: pointers compare

DType dtype_of(std::string_view name);             // null where there is none
DType dtype_of_safetensors(std::string_view name); // null where there is none
const std::vector<DTypeInfo>& dtypes();

using Shape = std::vector<int64_t>;
int64_t elements_of(const Shape& shape);
inline int64_t bytes_of(const Shape& shape, DType dtype) { return elements_of(shape) * dtype->itemsize; }

} // namespace mdtrt

#include "core/dtype.h"

#include <algorithm>

namespace mdtrt {

const std::vector<DTypeInfo>& dtypes() {
    static const std::vector<DTypeInfo> kDTypes = {
        {"float64", 8, "F64"},
        {"float32", 4, "F32"},
        {"float16", 2, "F16"},
        {"bfloat16", 2, "BF16"},
        {"int64", 8, "I64"},
        {"int32", 4, "I32"},
        {"int16", 2, "I16"},
        {"int8", 1, "I8"},
        {"uint64", 8, "U64"},
        {"uint32", 4, "U32"},
        {"uint16", 2, "U16"},
        {"uint8", 1, "U8"},
        {"bool", 1, "BOOL"},
        {"float8_e4m3fn", 1, "F8_E4M3"},
        {"float8_e5m2", 1, "F8_E5M2"},
        {"float8_e4m3fnuz", 1, ""},
        {"float8_e5m2fnuz", 1, ""},
        {"float8_e8m0fnu", 1, ""},
        {"float4_e2m1fn_x2", 1, ""},
        {"complex32", 4, ""},
        {"bcomplex32", 4, ""},
        {"complex64", 8, ""},
        {"complex128", 16, ""},
        {"qint8", 1, ""},
        {"quint8", 1, ""},
        {"qint32", 4, ""},
        {"quint4x2", 1, ""},
        {"quint2x4", 1, ""},
        {"bits1x8", 1, ""},
        {"bits2x4", 1, ""},
        {"bits4x2", 1, ""},
        {"bits8", 1, ""},
        {"bits16", 2, ""},
        {"uint1", 1, ""},
        {"uint2", 1, ""},
        {"uint3", 1, ""},
        {"uint4", 1, ""},
        {"uint5", 1, ""},
        {"uint6", 1, ""},
        {"uint7", 1, ""},
        {"int1", 1, ""},
        {"int2", 1, ""},
        {"int3", 1, ""},
        {"int4", 1, ""},
        {"int5", 1, ""},
        {"int6", 1, ""},
        {"int7", 1, ""},
    };
    return kDTypes;
}

DType dtype_of(std::string_view name) {
    for (const auto& info : dtypes())
        if (info.name == name) return &info;
    return nullptr;
}

DType dtype_of_safetensors(std::string_view name) {
    for (const auto& info : dtypes())
        if (!name.empty() && info.safetensors == name) return &info;
    return nullptr;
}

int64_t elements_of(const Shape& shape) {
    int64_t elements = 1;
    for (int64_t extent : shape) elements *= extent;
    return elements;
}

} // namespace mdtrt

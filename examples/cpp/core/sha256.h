#pragma once

#include <string>
#include <string_view>

namespace mdtrt {

std::string sha256(std::string_view bytes); // 64 hexadecimal digits

} // namespace mdtrt

// Values in messages.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mdtrt {

// 'text', with what does not print as \xNN, and cut where it is long: it may be anybody's.
std::string in_quotes(std::string_view text);
std::string listed(const std::vector<int64_t>& shape);     // [1, 512, 256]
std::string joined(const std::vector<std::string>& parts); // a, b, c
std::string mebibytes(int64_t bytes);                      // 12.5 MiB
std::string hex(std::string_view bytes);
std::string unhex(std::string_view text); // raises std::invalid_argument
// "rank 2", "ranks 0, 1", "every rank".
std::string ranks_named(const std::vector<int>& ranks, int size);

} // namespace mdtrt

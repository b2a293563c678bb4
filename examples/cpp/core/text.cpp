#include "core/text.h"

#include <cstdio>
#include <stdexcept>

namespace mdtrt {

std::string in_quotes(std::string_view text) {
    constexpr size_t kMost = 120;
    std::string out = "'";
    for (unsigned char c : text.substr(0, kMost)) {
        if (c < 0x20 || c == 0x7f || c == '\'' || c == '\\') {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, c == '\'' || c == '\\' ? "\\%c" : "\\x%02x", c);
            out += escaped;
        } else {
            out += static_cast<char>(c);
        }
    }
    return out + (text.size() > kMost ? "...'" : "'");
}

std::string listed(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size() && i < 64; ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

std::string joined(const std::vector<std::string>& parts) {
    std::string out;
    for (const auto& part : parts) out += (out.empty() ? "" : ", ") + part;
    return out;
}

std::string mebibytes(int64_t bytes) {
    char text[40];
    std::snprintf(text, sizeof text, "%.1f MiB", static_cast<double>(bytes) / (1 << 20));
    return text;
}

std::string hex(std::string_view bytes) {
    static const char kDigits[] = "0123456789abcdef";
    std::string out;
    for (unsigned char c : bytes) {
        out += kDigits[c >> 4];
        out += kDigits[c & 15];
    }
    return out;
}

std::string unhex(std::string_view text) {
    auto digit = [](char c) {
        if (c >= '0' && c <= '9') return c - '0';
        if (c >= 'a' && c <= 'f') return c - 'a' + 10;
        throw std::invalid_argument("not hexadecimal");
    };
    if (text.size() % 2) throw std::invalid_argument("an odd number of hexadecimal digits");
    std::string out;
    for (size_t i = 0; i < text.size(); i += 2) out += static_cast<char>(digit(text[i]) << 4 | digit(text[i + 1]));
    return out;
}

std::string ranks_named(const std::vector<int>& ranks, int size) {
    if (size > 1 && static_cast<int>(ranks.size()) == size) return "every rank";
    std::vector<std::string> names;
    for (int rank : ranks) names.push_back(std::to_string(rank));
    return (ranks.size() > 1 ? "ranks " : "rank ") + joined(names);
}

} // namespace mdtrt

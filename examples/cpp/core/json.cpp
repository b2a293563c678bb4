#include "core/json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "core/text.h"

namespace mdtrt {
namespace {

// Builds the value bottom up: `open_` are the lists and objects that are not closed yet.
class Builder : public nlohmann::json_sax<nlohmann::json> {
  public:
    bool null() override { return add(Json(nullptr)); }
    bool boolean(bool value) override { return add(Json(value)); }
    bool number_integer(int64_t value) override { return add(Json(value)); }
    bool number_unsigned(uint64_t value) override {
        if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
            return add(Json(static_cast<double>(value))); // no integer that a manifest may have
        return add(Json(static_cast<int64_t>(value)));
    }
    bool number_float(double value, const std::string&) override { return add(Json(value)); }
    bool string(std::string& value) override { return add(Json(std::move(value))); }
    bool binary(nlohmann::json::binary_t&) override { return false; }
    bool start_object(size_t) override { return open(true); }
    bool start_array(size_t) override { return open(false); }
    bool key(std::string& name) override {
        open_.back().name = std::move(name);
        return true;
    }
    bool end_object() override {
        check_names(open_.back().object);
        return close(Json(std::move(open_.back().object)));
    }
    bool end_array() override { return close(Json(std::move(open_.back().array))); }
    bool parse_error(size_t, const std::string&, const nlohmann::detail::exception& error) override {
        throw std::runtime_error(error.what());
    }

    Json result;

  private:
    struct Open {
        bool is_object;
        std::string name;
        Json::Array array;
        Json::Object object;
    };

    bool open(bool is_object) {
        if (open_.size() == Json::kDepth)
            throw std::runtime_error("it is nested deeper than " + std::to_string(Json::kDepth));
        open_.push_back({is_object, {}, {}, {}});
        return true;
    }
    bool close(Json value) {
        open_.pop_back();
        return add(std::move(value));
    }
    bool add(Json value) {
        if (++values_ > Json::kValues)
            throw std::runtime_error("it has more than " + std::to_string(Json::kValues) + " values");
        if (open_.empty())
            result = std::move(value);
        else if (open_.back().is_object)
            open_.back().object.emplace_back(std::move(open_.back().name), std::move(value));
        else
            open_.back().array.push_back(std::move(value));
        return true;
    }
    static void check_names(const Json::Object& object) {
        std::vector<std::string_view> names;
        for (const auto& entry : object) names.push_back(entry.first);
        std::sort(names.begin(), names.end());
        auto twice = std::adjacent_find(names.begin(), names.end());
        if (twice != names.end()) throw std::runtime_error("the name " + in_quotes(*twice) + " is twice in one object");
    }

    std::vector<Open> open_;
    size_t values_ = 0;
};

} // namespace

Json Json::parse(std::string_view text) {
    Builder builder;
    if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) throw std::runtime_error("it is no JSON");
    return std::move(builder.result);
}

const char* Json::kind() const {
    static const char* const kKinds[] = {"null",     "a boolean", "an integer", "a number that is no 64-bit integer",
                                         "a string", "a list",    "an object"};
    return kKinds[value_.index()];
}

void Json::refuse(const char* wanted) const {
    throw std::runtime_error(std::string("it is ") + kind() + ", where there must be " + wanted);
}

double Json::number() const {
    if (const auto* whole = std::get_if<int64_t>(&value_)) return static_cast<double>(*whole);
    return get<double>("a number");
}

const Json* Json::find(std::string_view name) const {
    for (const auto& entry : object())
        if (entry.first == name) return &entry.second;
    return nullptr;
}

std::string Json::text() const {
    std::string out;
    write(out);
    return out;
}

// Bytes of a character of UTF-8 that begins here, 0 where none does.
static size_t character(std::string_view text) {
    auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
    unsigned first = byte(0);
    size_t length = first < 0x80                    ? 1
                    : first >= 0xc2 && first < 0xe0 ? 2
                    : (first & 0xf0) == 0xe0        ? 3
                    : first >= 0xf0 && first < 0xf5 ? 4
                                                    : 0;
    for (size_t i = 1; i < length; ++i)
        if ((byte(i) & 0xc0) != 0x80) return 0;
    bool wrong = (first == 0xe0 && byte(1) < 0xa0) || (first == 0xed && byte(1) >= 0xa0) ||
                 (first == 0xf0 && byte(1) < 0x90) || (first == 0xf4 && byte(1) >= 0x90);
    return wrong ? 0 : length;
}

static void write_string(std::string_view text, std::string& out) {
    out += '"';
    while (!text.empty()) {
        unsigned char c = text[0];
        size_t length = character(text);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += text[0];
        } else if (c < 0x20) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
            out += escaped;
        } else if (length == 0) {
            out += '?'; // a path may be any bytes
        } else {
            out += text.substr(0, length);
        }
        text.remove_prefix(std::max<size_t>(length, 1));
    }
    out += '"';
}

void Json::write(std::string& out) const {
    if (const auto* truth = std::get_if<bool>(&value_)) {
        out += *truth ? "true" : "false";
    } else if (const auto* whole = std::get_if<int64_t>(&value_)) {
        out += std::to_string(*whole);
    } else if (const auto* real = std::get_if<double>(&value_)) {
        char text[40];
        std::snprintf(text, sizeof text, "%.17g", *real);
        out += std::isfinite(*real) ? text : "null";
    } else if (const auto* text = std::get_if<std::string>(&value_)) {
        write_string(*text, out);
    } else if (const auto* array = std::get_if<Array>(&value_)) {
        out += '[';
        for (size_t i = 0; i < array->size(); ++i) {
            if (i) out += ',';
            (*array)[i].write(out);
        }
        out += ']';
    } else if (const auto* object = std::get_if<Object>(&value_)) {
        out += '{';
        for (size_t i = 0; i < object->size(); ++i) {
            if (i) out += ',';
            write_string((*object)[i].first, out);
            out += ':';
            (*object)[i].second.write(out);
        }
        out += '}';
    } else {
        out += "null";
    }
}

Fields::Fields(const Json& json, std::string where) : where_(std::move(where)) {
    try {
        object_ = &json.object();
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(std::string(error.what()) + ", at " + where_);
    }
}

const Json* Fields::optional(const char* name) {
    names_.push_back(name);
    for (const auto& entry : *object_)
        if (entry.first == name) {
            ++asked_;
            return &entry.second;
        }
    return nullptr;
}

const Json& Fields::required(const char* name) {
    if (const Json* found = optional(name)) return *found;
    throw std::runtime_error("the field " + in_quotes(name) + " is missing, at " + where_);
}

void Fields::none_left() const {
    if (asked_ == object_->size()) return;
    for (const auto& entry : *object_)
        if (std::find(names_.begin(), names_.end(), entry.first) == names_.end())
            throw std::runtime_error("the field " + in_quotes(entry.first) + " is not known, at " + where_);
}

} // namespace mdtrt

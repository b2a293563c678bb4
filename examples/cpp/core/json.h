// JSON as it stands in the file: the names of an object keep their order, and none comes twice.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace mdtrt {

class Json {
  public:
    using Array = std::vector<Json>;
    using Object = std::vector<std::pair<std::string, Json>>;

    Json() = default;
    template <class T> Json(T value) : value_(std::move(value)) {}

    // Raises std::runtime_error: no JSON, nested deeper than `kDepth`, more than `kValues` values, or a name twice in
    // one object, which readers would take differently.
    static Json parse(std::string_view text);
    static constexpr int kDepth = 256;
    static constexpr size_t kValues = 1 << 24;

    bool is_null() const { return std::holds_alternative<std::nullptr_t>(value_); }
    // What it is, as messages have it: "an object", "a string".
    const char* kind() const;

    // Each raises std::runtime_error for another kind of value.
    bool boolean() const { return get<bool>("a boolean"); }
    int64_t integer() const { return get<int64_t>("an integer of 64 bits"); }
    double number() const; // an integer, too
    const std::string& string() const { return get<std::string>("a string"); }
    const Array& array() const { return get<Array>("a list"); }
    const Object& object() const { return get<Object>("an object"); }
    bool is_number() const { return std::holds_alternative<int64_t>(value_) || std::holds_alternative<double>(value_); }
    bool is_boolean() const { return std::holds_alternative<bool>(value_); }
    bool is_string() const { return std::holds_alternative<std::string>(value_); }

    const Json* find(std::string_view name) const; // of an object; null where it has none of that name

    // As text without line breaks; what is no UTF-8 is ?, and a number that is not finite is null.
    std::string text() const;

  private:
    template <class T> const T& get(const char* wanted) const {
        if (const T* found = std::get_if<T>(&value_)) return *found;
        refuse(wanted);
    }
    [[noreturn]] void refuse(const char* wanted) const;
    void write(std::string& out) const;

    std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value_ = nullptr;
};

// The fields of an object, each asked for once; raises std::runtime_error with the place of what is wrong.
class Fields {
  public:
    Fields(const Json& json, std::string where);
    const Json& required(const char* name);
    const Json* optional(const char* name);
    void none_left() const; // refuse what was not asked for
    std::string at(const char* name) const { return where_ + "." + name; }

  private:
    const Json::Object* object_;
    std::string where_;
    size_t asked_ = 0;
    std::vector<const char*> names_;
};

} // namespace mdtrt

#include "core/json.h"

#include <stdexcept>

#include "samples.h"

using mdtrt::Json;

static std::string refusal(const std::string& text) {
    try {
        Json::parse(text);
    } catch (const std::runtime_error& error) { return error.what(); }
    return "";
}

TEST_CASE("names keep their order, and text and back is the same") {
    std::string text = R"({"tp":2,"cp":4,"a":[1,-2,0.5,true,null,"x\"\\\u0001é"],"o":{}})";
    Json json = Json::parse(text);
    CHECK(json.object()[0].first == "tp");
    CHECK(json.object()[1].first == "cp");
    CHECK(json.text() == text);
    CHECK(Json::parse(json.text()).text() == text);
}

TEST_CASE("a name twice in one object is refused, in others not") {
    CHECK_SAYS(refusal(R"({"a": {"cp": 2, "tp": 2, "cp": 4}})"), "'cp' is twice");
    CHECK(refusal(R"([{"a": 1}, {"a": 1}])").empty());
}

TEST_CASE("what is no JSON, or too deep, is refused") {
    for (const char* text : {"", "{", "[1,]", "nul", "\"\xff\"", "[1] 2", "\"\\ud800\"", "01", "1e999", "NaN"})
        CHECK_MESSAGE(!refusal(text).empty(), text);
    std::string deep(Json::kDepth + 1, '[');
    CHECK_SAYS(refusal(deep), "nested deeper");
    CHECK_SAYS(refusal(std::string(10'000'000, '[')), "nested deeper");
    CHECK(refusal(std::string(Json::kDepth, '[') + std::string(Json::kDepth, ']')).empty());
}

TEST_CASE("an integer is one of 64 bits, and nothing else is one") {
    CHECK(Json::parse("9223372036854775807").integer() == INT64_MAX);
    CHECK(Json::parse("-9223372036854775808").integer() == INT64_MIN);
    for (const char* text : {"9223372036854775808", "1.0", "true", "\"1\"", "1e3"})
        CHECK_THROWS_AS(Json::parse(text).integer(), std::runtime_error);
    CHECK_THROWS_AS(Json::parse("1").boolean(), std::runtime_error);
}

TEST_CASE("text has UTF-8 only, whatever a message holds") {
    CHECK(Json(std::string("a\xff\xed\xa0\x80z")).text() == "\"a????z\"");
    CHECK(Json(std::string("\xe5\x90\x8d")).text() == "\"\xe5\x90\x8d\"");
    CHECK(Json(std::string("\xe5\x90")).text() == "\"??\"");
}

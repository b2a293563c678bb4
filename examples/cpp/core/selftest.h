// Self-tests: engines of one collective each, whose results are known before they run; docs/bundle.md says what they
// are.  A TensorRT that ignores a communicator, or takes another group than it was given, gives wrong values with no
// error, so all ranks run them before any other engine.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/manifest.h"

namespace mdtrt {

// Raises Error (BundleError): the manifest has not exactly the self-tests that its engines ask for, in the form that
// its schema gives them.
void check_self_tests(const Manifest& manifest);

// What the rank at this place of a group of `ranks` puts in.
std::vector<float> operand(int64_t ranks, int64_t place);

// What it must get, of any op but a ring.
std::vector<float> expected(const std::string& op, int64_t ranks, int64_t place);

// The error to raise where the result of the rank at this place is wrong.  `tensorrt` is for the message.
std::optional<Error> judge(const Segment& test, const std::vector<float>& result, int64_t place,
                           const std::string& tensorrt);

} // namespace mdtrt

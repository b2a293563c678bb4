// Errors: what is wrong, naming the thing and both values that disagree, and what to do instead.
#pragma once

#include <stdexcept>
#include <string>

namespace mdtrt {

inline constexpr int kFailed = 1;    // exit code after an Error
inline constexpr int kUsage = 2;     // exit code after a command line that is not understood
inline constexpr int kDeadline = 70; // exit code after a wait that took too long, as in Python

// `kind` is the name of Python's class for it: BundleError, MeshError, InputError, LaunchError, CommunicatorError.
class Error : public std::runtime_error {
  public:
    Error(std::string kind, std::string problem, std::string fix = "")
        : std::runtime_error(problem + (fix.empty() ? "" : "\n  Instead: " + fix)),
          kind(std::move(kind)),
          problem(std::move(problem)),
          fix(std::move(fix)) {}

    std::string kind, problem, fix;
    bool agreed = false; // every rank of the launch raises it
};

inline Error bundle_error(std::string problem, std::string fix) {
    return {"BundleError", std::move(problem), std::move(fix)};
}
inline Error input_error(std::string problem, std::string fix) {
    return {"InputError", std::move(problem), std::move(fix)};
}
inline Error launch_error(std::string problem, std::string fix = "") {
    return {"LaunchError", std::move(problem), std::move(fix)};
}

} // namespace mdtrt

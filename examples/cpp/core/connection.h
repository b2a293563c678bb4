// Messages over TCP: a length, a type, and that many bytes.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace mdtrt {

using Seconds = std::chrono::duration<double>;
using SteadyClock = std::chrono::steady_clock;

enum class Type : uint8_t { hello, welcome, refuse, ballot, verdict, beat, ended, bye, data };

struct Message {
    Type type;
    std::string body;
};

class Connection {
  public:
    explicit Connection(int descriptor, double send_timeout); // takes it over
    ~Connection();
    Connection(const Connection&) = delete;
    Connection& operator=(const Connection&) = delete;

    // From any thread; false where the other side is gone.
    bool send(Type type, std::string_view body);
    // What has come, without waiting.  Once the other side is gone, or says what is no message, `open` is false.
    std::vector<Message> receive();
    void finish(); // nothing more is sent

    int descriptor() const { return descriptor_; }
    std::atomic<bool> open{true};
    size_t most = 64 << 10; // bytes of a message; strangers get little

  private:
    int descriptor_;
    std::mutex sending_;
    std::string buffer_;
};

// A connection to a host and port, tried once; null where there is none within these seconds.
std::unique_ptr<Connection> connect_to(const std::string& host, int port, double seconds, double send_timeout);

// Listens on a port, 0 for any that is free: on the loopback interface where the host
// is written as that, else on all.
class Listener {
  public:
    Listener(const std::string& host, int port); // raises std::system_error; of EADDRINUSE where the port is taken
    ~Listener();
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    int accept(); // a descriptor, or -1
    int descriptor() const { return descriptor_; }
    int port() const;

  private:
    int descriptor_ = -1;
};

} // namespace mdtrt

#include "core/connection.h"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <system_error>
#include <unistd.h>

namespace mdtrt {
namespace {

constexpr size_t kHeader = 5;

struct Addresses {
    addrinfo* first = nullptr;
    Addresses(const char* host, int port, int flags) {
        addrinfo hints{};
        hints.ai_socktype = SOCK_STREAM;
        hints.ai_flags = flags | AI_NUMERICSERV;
        if (getaddrinfo(host, std::to_string(port).c_str(), &hints, &first)) first = nullptr;
    }
    ~Addresses() {
        if (first) freeaddrinfo(first);
    }
    Addresses(const Addresses&) = delete;
};

// By its name alone: a host's own name may lead to its loopback interface on that host, and elsewhere to it.
bool is_loopback(const std::string& host) {
    return host == "localhost" || host == "::1" || host.compare(0, 4, "127.") == 0;
}

int listening_at(const addrinfo* address) {
    int fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    int on = 1, off = 0;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address->ai_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, address->ai_addr, address->ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0) return fd;
    int code = errno;
    close(fd);
    errno = code;
    return -1;
}

} // namespace

Connection::Connection(int descriptor, double send_timeout) : descriptor_(descriptor) {
    int on = 1;
    setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    timeval limit{static_cast<time_t>(send_timeout) + 1, 0};
    setsockopt(descriptor, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~O_NONBLOCK);
}

Connection::~Connection() { close(descriptor_); }

bool Connection::send(Type type, std::string_view body) {
    std::lock_guard<std::mutex> lock(sending_);
    uint32_t length = static_cast<uint32_t>(body.size());
    std::string whole;
    for (int shift = 0; shift < 32; shift += 8) whole += static_cast<char>(length >> shift & 255);
    whole += static_cast<char>(type);
    whole += body;
    for (size_t at = 0; at < whole.size();) {
        ssize_t sent = ::send(descriptor_, whole.data() + at, whole.size() - at, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent <= 0) return false;
        at += sent;
    }
    return true;
}

std::vector<Message> Connection::receive() {
    char chunk[1 << 16];
    ssize_t got = recv(descriptor_, chunk, sizeof chunk, MSG_DONTWAIT);
    if (got == 0 || (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) open = false;
    if (got > 0) buffer_.append(chunk, got);
    std::vector<Message> found;
    size_t at = 0;
    while (buffer_.size() - at >= kHeader) {
        uint32_t length = 0;
        for (int i = 0; i < 4; ++i)
            length |= static_cast<uint32_t>(static_cast<unsigned char>(buffer_[at + i])) << (8 * i);
        auto type = static_cast<unsigned char>(buffer_[at + 4]);
        if (length > most || type > static_cast<unsigned char>(Type::data)) {
            open = false;
            break;
        }
        if (buffer_.size() - at - kHeader < length) break;
        found.push_back({static_cast<Type>(type), buffer_.substr(at + kHeader, length)});
        at += kHeader + length;
    }
    buffer_.erase(0, at);
    return found;
}

void Connection::finish() { shutdown(descriptor_, SHUT_WR); }

std::unique_ptr<Connection> connect_to(const std::string& host, int port, double seconds, double send_timeout) {
    Addresses addresses(host.c_str(), port, 0);
    for (addrinfo* address = addresses.first; address; address = address->ai_next) {
        int fd = socket(address->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0) continue;
        int error = 0;
        if (connect(fd, address->ai_addr, address->ai_addrlen)) {
            error = errno;
            pollfd waiting{fd, POLLOUT, 0};
            if (error == EINPROGRESS && poll(&waiting, 1, static_cast<int>(seconds * 1000)) == 1) {
                socklen_t length = sizeof error;
                getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
            }
        }
        // A port that nobody listens on may connect to itself.
        sockaddr_storage mine{}, theirs{};
        socklen_t mine_length = sizeof mine, their_length = sizeof theirs;
        bool itself = getsockname(fd, reinterpret_cast<sockaddr*>(&mine), &mine_length) == 0 &&
                      getpeername(fd, reinterpret_cast<sockaddr*>(&theirs), &their_length) == 0 &&
                      mine_length == their_length && std::memcmp(&mine, &theirs, mine_length) == 0;
        if (error == 0 && !itself) return std::make_unique<Connection>(fd, send_timeout);
        close(fd);
    }
    return nullptr;
}

Listener::Listener(const std::string& host, int port) {
    bool local = is_loopback(host);
    Addresses addresses(local ? host.c_str() : nullptr, port, local ? 0 : AI_PASSIVE);
    int code = EADDRNOTAVAIL;
    for (int family : {AF_INET6, AF_INET}) // of IPv6 all addresses are those of IPv4, too
        for (addrinfo* address = addresses.first; address && descriptor_ < 0 && code != EADDRINUSE;
             address = address->ai_next)
            if (address->ai_family == family) {
                descriptor_ = listening_at(address);
                if (descriptor_ < 0) code = errno;
            }
    if (descriptor_ < 0) throw std::system_error(code, std::generic_category());
}

Listener::~Listener() { close(descriptor_); }

int Listener::accept() { return accept4(descriptor_, nullptr, nullptr, SOCK_CLOEXEC); }

int Listener::port() const {
    sockaddr_storage address{};
    socklen_t length = sizeof address;
    getsockname(descriptor_, reinterpret_cast<sockaddr*>(&address), &length);
    return ntohs(address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&address)->sin6_port
                                               : reinterpret_cast<sockaddr_in*>(&address)->sin_port);
}

} // namespace mdtrt

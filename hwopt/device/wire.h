// Sockets: whole reads and writes, random bytes, addresses.
#pragma once
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <string>

namespace hwopt {

inline bool read_all(int from, void* data, size_t bytes) {
  for (char* at = static_cast<char*>(data); bytes;) {
    ssize_t count = read(from, at, bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    at += count, bytes -= size_t(count);
  }
  return true;
}

inline bool write_all(int to, const void* data, size_t bytes) {
  for (const char* at = static_cast<const char*>(data); bytes;) {
    ssize_t count = write(to, at, bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    at += count, bytes -= size_t(count);
  }
  return true;
}

inline bool read_text(int from, std::string& text, int32_t most) {
  int32_t length = 0;
  if (!read_all(from, &length, 4) || length < 0 || length > most) return false;
  text.resize(size_t(length));
  return read_all(from, &text[0], text.size());
}

inline bool write_text(int to, const std::string& text) {
  int32_t length = int32_t(text.size());
  return write_all(to, &length, 4) && write_all(to, text.data(), text.size());
}

inline std::string random_bytes(size_t count) {
  std::string bytes(count, '\0');
  for (size_t got = 0; got < count;) {
    ssize_t more = getrandom(&bytes[got], count - got, 0);
    if (more < 0) perror("getrandom"), _exit(1);
    got += size_t(more);
  }
  return bytes;
}

inline std::string random_name() {
  std::string name;
  for (unsigned char c : random_bytes(8)) name += "0123456789abcdef"[c >> 4], name += "0123456789abcdef"[c & 15];
  return name;
}

inline void wait_at_most(int socket, int seconds) {
  timeval limit{seconds, 0};
  setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

// A host that went away without a word is noticed within about a minute; answers are small and must not wait.
inline void tend(int socket) {
  int on = 1, idle = 20, every = 10, count = 4;
  setsockopt(socket, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPINTVL, &every, sizeof every);
  setsockopt(socket, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// A socket that listens or is connected, or -1.
inline int open_socket(const std::string& host, const std::string& port, bool listens, bool* loopback = nullptr) {
  addrinfo wanted{}, *found = nullptr;
  wanted.ai_socktype = SOCK_STREAM;
  wanted.ai_flags = listens ? AI_PASSIVE : 0;
  if (getaddrinfo(host.c_str(), port.c_str(), &wanted, &found)) return -1;
  int made = -1;
  for (addrinfo* one = found; one && made < 0; one = one->ai_next) {
    int on = 1, fd = socket(one->ai_family, one->ai_socktype | SOCK_CLOEXEC, one->ai_protocol);
    if (fd < 0) continue;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (!listens) wait_at_most(fd, 3);
    bool local = one->ai_family == AF_INET
                     ? ntohl(reinterpret_cast<sockaddr_in*>(one->ai_addr)->sin_addr.s_addr) >> 24 == 127
                     : IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<sockaddr_in6*>(one->ai_addr)->sin6_addr);
    if (loopback) *loopback = local;
    bool done = listens ? !bind(fd, one->ai_addr, one->ai_addrlen) && !listen(fd, 16) : !connect(fd, one->ai_addr, one->ai_addrlen);
    if (done) made = fd;
    else close(fd);
  }
  freeaddrinfo(found);
  return made;
}

inline int port_of(int socket) {
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  getsockname(socket, reinterpret_cast<sockaddr*>(&bound), &size);
  return ntohs(bound.ss_family == AF_INET ? reinterpret_cast<sockaddr_in*>(&bound)->sin_port
                                          : reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port);
}

}  // namespace hwopt

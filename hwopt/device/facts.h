// What the daemon says of the machine it runs on, as JSON.
#pragma once
#include <sched.h>
#include <sys/auxv.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

namespace hwopt {

inline std::string json_text(const std::string& text) {
  std::string out = "\"";
  for (unsigned char c : text) {
    char code[8];
    if (c == '"' || c == '\\') out += '\\', out += char(c);
    else if (c < 0x20) snprintf(code, sizeof code, "\\u%04x", c), out += code;
    else out += char(c);
  }
  return out + "\"";
}

inline std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line, '\0');
  return line.substr(0, line.find('\n'));
}

// The first "name : value" of /proc/cpuinfo.
inline std::string cpuinfo(const std::string& name) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.compare(0, name.size(), name) == 0) {
      size_t at = line.find(':');
      if (at != std::string::npos && at + 2 <= line.size()) return line.substr(at + 2);
    }
  return "";
}

inline const char* architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__i386__)
  return "i386";
#elif defined(__aarch64__)
  return "aarch64";
#elif defined(__arm__)
  return "arm";
#elif defined(__riscv)
  return "riscv";
#else
  return "unknown";
#endif
}

// A board's model, else the processor's.
inline std::string model() {
  std::string found = first_line("/proc/device-tree/model");
  if (found.empty()) found = cpuinfo("model name");
  if (found.empty()) found = cpuinfo("Model");
  return found.empty() ? architecture() : found;
}

inline int usable_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) ? int(sysconf(_SC_NPROCESSORS_ONLN)) : CPU_COUNT(&cores);
}

inline std::string facts(const std::string& name, const std::string& key, const std::string& instance) {
  utsname system{};
  uname(&system);
  const std::string clock = "/sys/devices/system/cpu/cpu0/cpufreq/";
  std::string most = first_line(clock + "cpuinfo_max_freq"), now = first_line(clock + "scaling_cur_freq");
  long megabytes = long(double(sysconf(_SC_PHYS_PAGES)) * double(sysconf(_SC_PAGESIZE)) / (1 << 20));
  std::string flags;
#if defined(__x86_64__) || defined(__i386__)
  flags = cpuinfo("flags");
  if (now.empty()) now = cpuinfo("cpu MHz").empty() ? "" : std::to_string(long(std::stod(cpuinfo("cpu MHz")) * 1000));
#elif defined(__riscv)
  flags = cpuinfo("isa");
#endif
  return "{\"name\": " + json_text(name) + ", \"key\": " + json_text(key) + ", \"instance\": " + json_text(instance) + ", \"machine\": \"" +
         architecture() + "\", \"model\": " + json_text(model()) + ", \"flags\": " + json_text(flags) +
         ", \"hwcap\": " + std::to_string(getauxval(AT_HWCAP)) + ", \"hwcap2\": " + std::to_string(getauxval(AT_HWCAP2)) +
         ", \"cores\": " + std::to_string(usable_cores()) + ", \"clock_khz\": " + json_text(now) + ", \"clock_most_khz\": " +
         json_text(most) + ", \"governor\": " + json_text(first_line(clock + "scaling_governor")) +
         ", \"memory_mb\": " + std::to_string(megabytes) + ", \"system\": " +
         json_text(std::string(system.sysname) + " " + system.release) + "}";
}

}  // namespace hwopt

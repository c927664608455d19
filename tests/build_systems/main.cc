// The same library from C++.
#include <array>

#include "small.h"

int main() {
  std::array<float, 3 * 8 * 8> image{};
  std::array<float, 4> classes{};
  const hwopt_info *info = small_info();
  if (info->inputs_count != 1 || info->inputs[0].bytes != sizeof image) return 1;
  return small_run(image.data(), classes.data(), nullptr);
}

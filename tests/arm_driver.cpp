// Prints a point-wise mixture convolution of made-up numbers by the backend "streamed", for tests/test_cross_compile.py.
#include <cstdio>

#include "streamed.cpp"

int main() {
  const Int samples = 2, g_out = 2, g_in = 2, n = 5, c_out = 19, c_in = 21, positions = 23;
  const Int mixtures = g_out * g_in, channels = g_in * c_in;
  const std::vector<Int> rows = steps(positions, channels), zero(1);
  std::vector<real> x(samples * channels * positions), alpha(samples * mixtures * n), cells(n * c_out * c_in);
  std::vector<real> scratch(x.size()), y(samples * g_out * c_out * positions);
  Int seed = 1;
  for (auto *values : {&x, &alpha, &cells})
    for (real &value : *values) seed = seed * 48271 % 2147483647, value = real(seed % 2001 - 1000) / 1000;
  const Call call = {samples, g_out, g_in, 1, n, c_out, c_in, positions, mixtures * n, n, positions, positions,
                     channels, 0, 0, 2, rows.data(), zero.data(), rows.data(), zero.data()};
  forward(&call, x.data(), alpha.data(), cells.data(), scratch.data(), y.data());
  for (real value : y) std::printf("%.17g\n", double(value));
}

// One error for each sanitizer: the sanitizer run fails unless they are reported.
#include <climits>

extern "C" int read_past_the_end(int index) {
  int* volatile numbers = new int[4]{1, 2, 3, 4};
  const int value = numbers[index];
  delete[] numbers;
  return value;
}

extern "C" int overflow(int number) { return INT_MAX + number; }

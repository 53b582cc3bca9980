// The kernels for any machine: 16-byte vectors (SSE2, NEON), with the compiler's baseline instruction set.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/kernels.h"

#define SK_ARCH arch_default
#define SK_VECTOR_BYTES 16
#define SK_TABLE kernels_default
#define SK_NAME "default"
#include "cpu/kernels_impl.h"

// The launches of one call, recorded while Python makes them the first time and replayed by later calls with the same
// signature. `selfsup_kernels/tiles/tape.py` records; the ops in ops.cpp look tapes up and replay them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace selfsup_kernels::launch {

using torch::stable::Tensor;
using Inputs = std::vector<std::optional<Tensor>>;  // the tensors of a call; at least one is given

// A tensor that the call allocates and returns.
struct Output {
  std::vector<int64_t> sizes, strides;
  int32_t dtype;  // as the shim numbers them
};

// An address: `offset` bytes into a slot. Slots are the call's inputs, its outputs, then the workspace.
struct Address {
  int slot;
  int64_t offset;
};

struct Pointer {
  uint32_t at;  // the offset in the parameters
  Address address;
};

struct Number {
  uint32_t at;
  bool wide;  // float64, not float32
};

struct Map {
  uint32_t at;
  Address address;
  int type, swizzle, fill;
  std::vector<uint64_t> sizes, strides;  // innermost first; strides in bytes, without the innermost
  std::vector<uint32_t> box;
};

struct Launch {
  std::string name;
  void* function;  // CUfunction
  unsigned grid[3], threads, shared_bytes;
  std::vector<unsigned char> parameters;  // zeros where a pointer, a number or a map goes
  std::vector<uint32_t> offsets;          // of each parameter
  std::vector<Pointer> pointers;
  std::vector<Number> numbers;
  std::vector<Map> maps;
};

// Makes a launch on a stream. `slots` are what addresses are relative to, `number` is the value of the parameters that
// change from call to call.
void start(const Launch& launch, const std::vector<char*>& slots, double number, void* stream);

// Loads the kernel `name` of an image of machine code into the context of `device`, for good. Returns a CUfunction.
void* load(const std::string& image, const std::string& name, unsigned shared_bytes, int device);

struct Tape {
  std::vector<Output> outputs;
  int64_t workspace_bytes = 0;
  std::vector<Launch> launches;

  // Allocates the outputs, makes the launches on the current stream of the device of `inputs`, and returns the outputs;
  // nothing if there is not enough memory.
  std::optional<std::vector<Tensor>> replay(const Inputs& inputs, double number) const;
};

}  // namespace selfsup_kernels::launch

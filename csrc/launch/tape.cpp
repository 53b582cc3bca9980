#include "launch/tape.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "launch/driver.h"

namespace selfsup_kernels::launch {

namespace {

constexpr size_t alignment = 64;  // of a tensor map
constexpr unsigned shared_without_asking = 48 << 10;
constexpr int most_dynamic_shared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int prefer_shared = 1;        // CU_FUNC_CACHE_PREFER_SHARED

// Memory for the parameters of one launch, kept by each thread.
class Scratch {
 public:
  unsigned char* get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset(static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(alignment))));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(alignment)); }
  };
  std::unique_ptr<unsigned char, Delete> memory_;
  size_t size_ = 0;
};

// Appends a new tensor on the device of `like`; false if there is not enough memory.
bool allocate(
    const std::vector<int64_t>& sizes,
    const std::vector<int64_t>& strides,
    int32_t dtype,
    const Tensor& like,
    std::vector<Tensor>& to) {
  int32_t type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  const auto status = aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, type, like.get_device(), &handle);
  if (status == 0) to.emplace_back(handle);
  return status == 0;
}

char* at(const std::vector<char*>& slots, const Address& address) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(slots[address.slot]) + address.offset);
}

}  // namespace

void start(const Launch& l, const std::vector<char*>& slots, double number, void* stream) {
  thread_local Scratch scratch;
  thread_local std::vector<void*> addresses;
  const Driver& driver = Driver::get();
  unsigned char* const to = scratch.get(l.parameters.size());
  std::memcpy(to, l.parameters.data(), l.parameters.size());
  for (const Pointer& p : l.pointers) {
    char* const address = at(slots, p.address);
    std::memcpy(to + p.at, &address, sizeof(address));
  }
  for (const Number& n : l.numbers) {
    const float narrow = static_cast<float>(number);
    n.wide ? std::memcpy(to + n.at, &number, sizeof(number)) : std::memcpy(to + n.at, &narrow, sizeof(narrow));
  }
  for (const Map& m : l.maps) {
    static constexpr uint32_t steps[5] = {1, 1, 1, 1, 1};
    static constexpr int no_interleave = 0, promote_128_bytes = 2;
    driver.check(
        driver.encode_map(
            to + m.at,
            m.type,
            m.sizes.size(),
            at(slots, m.address),
            m.sizes.data(),
            m.strides.data(),
            m.box.data(),
            steps,
            no_interleave,
            m.swizzle,
            promote_128_bytes,
            m.fill),
        l.name.c_str());
  }
  addresses.clear();
  for (uint32_t at : l.offsets) addresses.push_back(to + at);
  driver.check(
      driver.launch_kernel(
          l.function,
          l.grid[0],
          l.grid[1],
          l.grid[2],
          l.threads,
          1,
          1,
          l.shared_bytes,
          stream,
          addresses.data(),
          nullptr),
      l.name.c_str());
}

void* load(const std::string& image, const std::string& name, unsigned shared_bytes, int device) {
  const Driver& driver = Driver::get();
  driver.ensure_context(device);
  void *module = nullptr, *function = nullptr;
  driver.check(driver.module_load(&module, image.data()), name.c_str());
  driver.check(driver.module_function(&function, module, name.c_str()), name.c_str());
  if (shared_bytes > shared_without_asking) {
    driver.check(driver.prefer_cache(function, prefer_shared), name.c_str());
    driver.check(driver.set_attribute(function, most_dynamic_shared, static_cast<int>(shared_bytes)), name.c_str());
  }
  return function;
}

std::optional<std::vector<Tensor>> Tape::replay(const Inputs& inputs, double number) const {
  const Driver& driver = Driver::get();
  const Tensor& like = **std::find_if(inputs.begin(), inputs.end(), [](const auto& t) { return t.has_value(); });
  const bool on_gpu = !like.is_cpu();  // CPU tensors only with the stub driver of the tests
  const int device = on_gpu ? like.get_device() : 0;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (on_gpu) guard.emplace(device);
  driver.ensure_context(device);
  void* const stream = on_gpu ? current_stream(device) : nullptr;

  std::vector<Tensor> made;
  made.reserve(outputs.size() + 1);
  for (const Output& o : outputs)
    if (!allocate(o.sizes, o.strides, o.dtype, like, made)) return std::nullopt;
  if (workspace_bytes && !allocate({workspace_bytes}, {1}, aoti_torch_dtype_uint8(), like, made)) return std::nullopt;
  std::vector<char*> slots;
  slots.reserve(inputs.size() + made.size());
  for (const auto& t : inputs) slots.push_back(t ? static_cast<char*>(t->data_ptr()) : nullptr);
  for (const Tensor& t : made) slots.push_back(static_cast<char*>(t.data_ptr()));

  for (const Launch& l : launches) start(l, slots, number, stream);
  if (workspace_bytes) made.pop_back();
  return made;
}

}  // namespace selfsup_kernels::launch

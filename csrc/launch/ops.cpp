// The ops info_nce_forward.triton and info_nce_backward.triton on CUDA tensors: a call with a known signature replays
// its tape; any other goes through the Python launchers, the ops' overload `launch`, which may record one.
//
// A signature is everything that the launches depend on, apart from addresses and the temperature: PyTorch's settings
// and the arguments' shapes, strides, dtypes, device and alignment, exactly and not as a hash.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "generated/call.h"
#include "launch/bind.h"
#include "launch/driver.h"
#include "launch/tape.h"

namespace selfsup_kernels::launch {

namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

using Signature = std::vector<uint64_t>;

struct Hash {
  size_t operator()(const Signature& signature) const {
    uint64_t h = 0;
    for (uint64_t word : signature) h = (h ^ word) * 0x9E3779B97F4A7C15u + (h >> 29);
    return h;
  }
};

class Cache {
 public:
  // Returns whether the signature is known; its tape is null if calls with it cannot be replayed.
  bool find(const Signature& signature, std::shared_ptr<const Tape>& tape) {
    std::lock_guard lock(mutex_);
    auto found = tapes_.find(signature);
    if (found == tapes_.end()) return false;
    tape = found->second;
    return true;
  }
  void store(const Signature& signature, std::shared_ptr<const Tape> tape) {
    std::lock_guard lock(mutex_);
    if (tapes_.size() >= most) tapes_.clear();
    tapes_[signature] = std::move(tape);
  }
  size_t size() {
    std::lock_guard lock(mutex_);
    return tapes_.size();
  }
  void clear() {
    std::lock_guard lock(mutex_);
    tapes_.clear();
  }

 private:
  static constexpr size_t most = 1024;  // a tape of ten launches takes 10 KB
  std::mutex mutex_;
  std::unordered_map<Signature, std::shared_ptr<const Tape>, Hash> tapes_;
};

Cache cache;

// PyTorch's settings that launches depend on, as bits; negative if no tape may be used.
int64_t read_settings() {
  pybind11::gil_scoped_acquire locked;
  PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<pybind11::object> function;
  function.call_once_and_store_result(
      [] { return pybind11::module_::import("selfsup_kernels.tiles.tape").attr("settings"); });
  return function.get_stored()().cast<int64_t>();
}

// The message of what Python raised below C++, which is only told that there was something.
std::string failure() {
  pybind11::gil_scoped_acquire locked;
  return pybind11::module_::import("selfsup_kernels.core.ops").attr("failure")().cast<std::string>();
}

// The signature of this thread's call while it goes through Python, until Python stores its tape.
thread_local const Signature* awaited = nullptr;

// One kind of argument a character: T tensor, ? optional tensor, L list of tensors, n number, t the temperature.
struct Op {
  const char* name;
  std::string arguments;
};

const Op& forward_op() {
  static const Op op{"selfsup_kernels::info_nce_forward", "L????" + std::string(Call::fields - 1, 'n') + 't'};
  return op;
}

const Op& backward_op() {
  static const Op op{
      "selfsup_kernels::info_nce_backward",
      std::string(1 + saved_fields, 'T') + '?' + std::string(Call::fields - 1, 'n') + "tnn"};
  return op;
}

// Writes what a tape depends on in a tensor. Strides of dimensions of one element are arbitrary, and still compared.
void describe(const Tensor& t, void* address, Signature& signature) {
  int32_t type = 0, dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  const bool aligned = reinterpret_cast<uintptr_t>(address) % 16 == 0;
  const uint64_t index = static_cast<uint8_t>(t.get_device());
  signature.push_back(
      static_cast<uint64_t>(t.dim()) << 40 | static_cast<uint64_t>(static_cast<uint8_t>(type)) << 32 |
      static_cast<uint64_t>(static_cast<uint16_t>(dtype)) << 16 | index << 8 | aligned);
  for (int64_t n : t.sizes()) signature.push_back(n);
  for (int64_t n : t.strides()) signature.push_back(n);
}

void call(const Op& op, StableIValue* stack) {
  thread_local Signature signature;
  signature = {reinterpret_cast<uintptr_t>(op.name), static_cast<uint64_t>(read_settings())};
  const bool taped = static_cast<int64_t>(signature[1]) >= 0;

  Inputs inputs;
  std::vector<void*> addresses;
  double temperature = 0;
  for (size_t i = 0; i < op.arguments.size(); ++i) {
    const size_t before = inputs.size();
    switch (op.arguments[i]) {
      case 'T':
        inputs.push_back(to<Tensor>(stack[i]));
        break;
      case '?':
        inputs.push_back(to<std::optional<Tensor>>(stack[i]));
        break;
      case 'L':
        for (Tensor& t : to<std::vector<Tensor>>(stack[i])) inputs.push_back(std::move(t));
        break;
      case 't':
        temperature = to<double>(stack[i]);
        break;
      default:
        signature.push_back(stack[i]);
    }
    if (inputs.size() == before) continue;
    signature.push_back(inputs.size() - before);
    for (size_t k = before; k < inputs.size(); ++k) {
      addresses.push_back(inputs[k] ? inputs[k]->data_ptr() : nullptr);
      if (!inputs[k]) {
        signature.push_back(~uint64_t{0});
        continue;
      }
      // The first input with the same address: a recorder tells inputs apart by their addresses.
      signature.push_back(std::find(addresses.begin(), addresses.end(), addresses[k]) - addresses.begin());
      describe(*inputs[k], addresses[k], signature);
    }
  }

  std::shared_ptr<const Tape> tape;
  const bool known = taped && cache.find(signature, tape);
  if (tape) {
    if (const auto results = tape->replay(inputs, temperature)) {
      for (size_t i = 0; i < results->size(); ++i) stack[i] = from((*results)[i]);
      return;
    }  // else Python will raise PyTorch's own error
  }
  size_t next = 0;
  for (size_t i = 0; i < op.arguments.size(); ++i) {
    const char kind = op.arguments[i];
    if (kind == 'T')
      stack[i] = from(*inputs[next++]);
    else if (kind == '?')
      stack[i] = from(inputs[next++]);
    else if (kind == 'L') {
      std::vector<Tensor> list;
      for (; next + 4 < inputs.size(); ++next) list.push_back(*inputs[next]);  // four optional tensors follow
      stack[i] = from(list);
    }
  }
  const Signature own = signature;  // Python may let another call of this thread use the buffer
  const Signature* const outer = awaited;
  awaited = taped && !known ? &own : nullptr;
  const auto status = torch_call_dispatcher(op.name, "launch", stack, TORCH_ABI_VERSION);
  awaited = outer;
  if (status != 0) throw std::runtime_error(failure());
}

// ---- The description of a tape that Python gives ----

namespace py = pybind11;

int32_t dtype_of(const std::string& name) {
  static const std::unordered_map<std::string, int32_t (*)()> known{
      {"float64", aoti_torch_dtype_float64},
      {"float32", aoti_torch_dtype_float32},
      {"bfloat16", aoti_torch_dtype_bfloat16},
      {"float16", aoti_torch_dtype_float16},
      {"int64", aoti_torch_dtype_int64},
      {"int32", aoti_torch_dtype_int32}};
  auto found = known.find(name);
  STD_TORCH_CHECK(found != known.end(), "dtype: unknown ", name);
  return found->second();
}

Address address_of(const py::handle& at) {
  auto [slot, offset] = at.cast<std::pair<int, int64_t>>();
  return {slot, offset};
}

Launch launch_of(const py::handle& described) {
  Launch l;
  l.name = described.attr("name").cast<std::string>();
  l.function = reinterpret_cast<void*>(described.attr("function").cast<uintptr_t>());
  auto grid = described.attr("grid").cast<std::vector<unsigned>>();
  STD_TORCH_CHECK(grid.size() == 3, "grid: expected three numbers");
  std::copy(grid.begin(), grid.end(), l.grid);
  l.threads = described.attr("threads").cast<unsigned>();
  l.shared_bytes = described.attr("shared_bytes").cast<unsigned>();
  for (const py::handle& p : described.attr("parameters")) {
    const auto kind = p.attr("kind").cast<std::string>();
    const py::object value = p.attr("value");
    const size_t size = kind == "map" ? 128 : kind == "constant" ? py::len(value) : kind == "float32" ? 4 : 8;
    const size_t align = kind == "map" ? 64 : 8;
    const auto at = static_cast<uint32_t>((l.parameters.size() + align - 1) / align * align);
    l.offsets.push_back(at);
    l.parameters.resize(at + size);
    if (kind == "constant") {
      const auto bytes = value.cast<std::string>();
      std::copy(bytes.begin(), bytes.end(), l.parameters.begin() + at);
    } else if (kind == "pointer") {
      l.pointers.push_back({at, address_of(value)});
    } else if (kind == "map") {
      l.maps.push_back(
          {at,
           address_of(value.attr("address")),
           value.attr("type").cast<int>(),
           value.attr("swizzle").cast<int>(),
           value.attr("fill").cast<int>(),
           value.attr("sizes").cast<std::vector<uint64_t>>(),
           value.attr("strides").cast<std::vector<uint64_t>>(),
           value.attr("box").cast<std::vector<uint32_t>>()});
    } else {
      STD_TORCH_CHECK(kind == "float32" || kind == "float64", "unknown kind of parameter: ", kind);
      l.numbers.push_back({at, kind == "float64"});
    }
  }
  return l;
}

void store(const py::object& described) {
  STD_TORCH_CHECK(awaited, "no call waits for a tape");
  Driver::get();  // from here on a forked process is refused
  std::shared_ptr<Tape> tape;
  if (!described.is_none()) {
    tape = std::make_shared<Tape>();
    for (const py::handle& o : described.attr("outputs")) {
      auto [sizes, strides, dtype] = o.cast<std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::string>>();
      tape->outputs.push_back({sizes, strides, dtype_of(dtype)});
    }
    tape->workspace_bytes = described.attr("workspace_bytes").cast<int64_t>();
    for (const py::handle& l : described.attr("launches")) tape->launches.push_back(launch_of(l));
  }
  cache.store(*awaited, std::move(tape));
}

// Makes one launch on the current stream of a device, its addresses absolute. `number` as in a replay.
void start_described(const py::object& described, double number, int device, bool on_gpu) {
  const Launch launch = launch_of(described);
  const py::gil_scoped_release unlocked;  // the driver waits where its queue is full
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (on_gpu) guard.emplace(device);
  Driver::get().ensure_context(device);
  start(launch, {nullptr}, number, on_gpu ? current_stream(device) : nullptr);
}

uintptr_t load_image(const py::bytes& code, const std::string& name, unsigned shared_bytes, int device, bool on_gpu) {
  const std::string image = code;
  const py::gil_scoped_release unlocked;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (on_gpu) guard.emplace(device);
  return reinterpret_cast<uintptr_t>(load(image, name, shared_bytes, device));
}

}  // namespace

void bind(py::module_& m) {
  m.doc() = "Tapes of the launches of calls on a GPU.";
  m.def("awaited", [] { return awaited != nullptr; }, "Return whether the current call can be recorded.");
  m.def("store", &store, "Store the tape of the current call; None if calls like it cannot be replayed.");
  m.def("load", &load_image, "Load a kernel from machine code; return its CUfunction.");
  m.def("start", &start_described, "Make a launch whose addresses are absolute.");
  m.def("size", [] { return cache.size(); }, "Return the number of known signatures.");
  m.def("clear", [] { cache.clear(); }, "Forget all tapes.");
}

}  // namespace selfsup_kernels::launch

namespace {

void forward(StableIValue* stack, uint64_t, uint64_t) {
  selfsup_kernels::launch::call(selfsup_kernels::launch::forward_op(), stack);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  selfsup_kernels::launch::call(selfsup_kernels::launch::backward_op(), stack);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CUDA, m) {
  m.impl("info_nce_forward.triton", &forward);
  m.impl("info_nce_backward.triton", &backward);
}

// For Triton's interpreter and the stub driver of the tests, which take CPU tensors.
STABLE_TORCH_LIBRARY_IMPL(selfsup_kernels, CPU, m) {
  m.impl("info_nce_forward.triton", &forward);
  m.impl("info_nce_backward.triton", &backward);
}

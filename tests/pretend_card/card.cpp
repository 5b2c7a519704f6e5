// A CUDA device for PyTorch's CPU build: its memory, its streams and graphs, and its kernels.
//
// PyTorch's own C++ and Python stay as they are. What a CUDA build brings as libtorch_cuda is put
// in its place here, as little of it as can be:
//
//   memory    host memory that is counted, limited, and filled with NaN before and after its use
//   streams   numbers: all work is done at once, in order, by whoever asks for it
//   kernels   the CPU's, over the same memory: see `launch`
//   graphs    what was launched on a capturing stream, done again: see `Graph`
//
// Tensors are real ones of device cuda:0 or cuda:1. The Python side is __init__.py.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using c10::Device, c10::DeviceType, c10::DeviceIndex, c10::IValue, c10::Stream, c10::StreamId;
using torch::jit::Stack;

namespace {

constexpr int DEVICES = 2;
std::recursive_mutex lock;
thread_local DeviceIndex device_now = 0;
thread_local StreamId streams_now[DEVICES] = {};

// ---- what Python is told -----------------------------------------------------------------------

// `kind` of wait, and in words what was waited for: Python knows which line it was.
void (*on_wait)(const char* what) = [](const char*) {};

// ---- graphs ------------------------------------------------------------------------------------

struct Launch {  // of a kernel: tensors are the CPU's, over the device's memory
  c10::OperatorHandle kernel;
  Stack arguments;
  std::vector<Tensor> outputs;  // where the results that it makes anew belong
};

// What was launched while a stream was capturing. PyTorch captures without running; here the
// kernels do run, since their results' shapes are needed, and are undone in the end: `before`
// restores what they wrote, and what they allocated is filled with NaN until a replay.
struct Graph {
  DeviceIndex device;
  int64_t pool;
  std::vector<Launch> launches;
  std::map<char*, std::string> before;  // by block: what it held when it was first written
  std::map<char*, int64_t> reads;       // blocks of others, and which allocation they were
  bool broken = false;                  // by a call that no capture allows
};
std::map<int64_t, Graph> graphs;
std::map<StreamId, int64_t> capturing;  // by stream
int64_t captures = 0, replays = 0, ids = 0;

Graph* capture_on(DeviceIndex device) {
  auto found = capturing.find(streams_now[device]);
  return found == capturing.end() ? nullptr : &graphs.at(found->second);
}

// The host waits for the device. Within a capture CUDA refuses.
void wait(const std::string& what) {
  if (!capturing.empty()) {
    for (auto& [stream, id] : capturing) graphs.at(id).broken = true;
    TORCH_CHECK(false, "CUDA error: operation not permitted when stream is capturing: ", what);
  }
  on_wait(what.c_str());
}

// ---- memory ------------------------------------------------------------------------------------

struct Block {
  size_t size;
  DeviceIndex device;
  int64_t serial;
  int64_t pool;  // of a graph; 0 for none
};
struct Memory {  // of a device, in bytes
  size_t total = size_t(80) << 30, others = 0;
  double fraction = 1.0;
  size_t allocated = 0, peak = 0, reserved = 0, peak_reserved = 0;
  size_t limit() const { return std::min<size_t>(fraction * total, total - others); }
} memory[DEVICES];
struct Pool {  // memory that the graphs which share it keep to themselves
  int users = 0;
  size_t kept = 0, free = 0;  // of which `free` is in no tensor
  std::vector<char*> given_back;
};
std::map<char*, Block> blocks;
std::map<int64_t, Pool> pools;

Block* block_of(const Tensor& x) {
  auto found = blocks.find(static_cast<char*>(x.storage().mutable_data()));
  return found == blocks.end() ? nullptr : &found->second;
}

void count(Memory& m) {
  size_t kept = 0;
  for (auto& [id, pool] : pools) kept += pool.free;
  m.peak = std::max(m.peak, m.allocated);
  m.reserved = std::max(m.reserved, m.allocated + kept);
  m.peak_reserved = std::max(m.peak_reserved, m.reserved);
}

void release(void* at) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto start = static_cast<char*>(at);
  auto [size, device, serial, pool] = blocks.at(start);
  memory[device].allocated -= size;
  std::memset(start, 0xff, size);
  if (auto found = pools.find(pool); found != pools.end()) {
    found->second.free += size;
    found->second.given_back.push_back(start);
  } else {
    blocks.erase(start);
    std::free(start);
  }
}

struct CardMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard<std::recursive_mutex> held(lock);
    Device device(DeviceType::CUDA, device_now);
    if (n == 0) return {nullptr, nullptr, [](void*) {}, device};
    size_t size = (n + 511) / 512 * 512;
    Memory& m = memory[device_now];
    Graph* graph = capture_on(device_now);
    Pool* pool = graph ? &pools[graph->pool] : nullptr;
    size_t kept = 0;
    for (auto& [id, other] : pools) kept += other.free;
    if (pool && pool->free >= size) kept -= size;
    TORCH_CHECK_WITH(OutOfMemoryError, m.allocated + kept + size <= m.limit(),
        "CUDA out of memory. Tried to allocate ", n, " bytes: the pretend card has ", m.limit(),
        ", of which ", m.allocated + kept, " are in use.");
    if (pool) pool->free -= std::min(pool->free, size);
    auto start = static_cast<char*>(std::aligned_alloc(512, size));
    std::memset(start, 0xff, size);  // NaN in every floating type
    blocks[start] = {size, device_now, ++ids, graph ? graph->pool : 0};
    m.allocated += size;
    count(m);
    return {start, start, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
} card_memory;

std::set<const void*> pinned;  // blocks of page-locked host memory
struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    std::lock_guard<std::recursive_mutex> held(lock);
    void* start = std::malloc(std::max<size_t>(n, 1));
    pinned.insert(start);
    return {start, start, [](void* at) {
      std::lock_guard<std::recursive_mutex> held(lock);
      pinned.erase(at);
      std::free(at);
    }, Device(DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t n) const override {
    default_copy_data(to, from, n);
  }
} pinned_memory;

// ---- devices, streams and events ---------------------------------------------------------------

struct Event {
  int64_t graph;  // that was being captured where it was recorded; 0 for none
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device of(DeviceIndex i) { return Device(DeviceType::CUDA, i); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override {
    return of(std::exchange(device_now, d.index()));
  }
  Device getDevice() const override { return of(device_now); }
  void setDevice(Device d) const override { uncheckedSetDevice(d); }
  void uncheckedSetDevice(Device d) const noexcept override {
    if (d.has_index()) device_now = d.index();
  }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  Stream stream(Device d, StreamId id) const {
    return Stream(Stream::UNSAFE, of(d.has_index() ? d.index() : device_now), id);
  }
  Stream getStream(Device d) const override {
    return stream(d, streams_now[d.has_index() ? d.index() : device_now]);
  }
  Stream getDefaultStream(Device d) const override { return stream(d, 0); }
  Stream getNewStream(Device d, int) const override { return stream(d, ++ids); }
  Stream exchangeStream(Stream s) const override {
    return stream(s.device(), std::exchange(streams_now[s.device_index()], s.id()));
  }
  bool isStreamCapturing(const Stream& s) const {  // PyTorch asks since 2.12
    return capturing.count(s.id());
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { wait("a stream"); }
  void synchronizeDevice(const DeviceIndex) const override { wait("the device"); }

  void record(void** event, const Stream& s, const DeviceIndex, const c10::EventFlag) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    auto found = capturing.find(s.id());
    delete static_cast<Event*>(*event);
    *event = new Event{found == capturing.end() ? 0 : found->second};
  }
  // A stream that waits for one that is capturing takes part in the capture.
  void block(void* event, const Stream& s) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    if (auto e = static_cast<Event*>(event); e && e->graph) capturing[s.id()] = e->graph;
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { wait("an event"); }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
};
Guard guard;
c10::impl::DeviceGuardImplRegistrar guard_registrar(DeviceType::CUDA, &guard);

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return device_now; }
  void setCurrentDevice(DeviceIndex i) const override { device_now = i; }
  DeviceIndex exchangeDevice(DeviceIndex i) const override {
    return std::exchange(device_now, i);
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return exchangeDevice(i); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* at) const override {
    std::lock_guard<std::recursive_mutex> held(lock);
    return pinned.count(at);
  }
};

// ---- kernels -----------------------------------------------------------------------------------

bool on_card(const Tensor& x) { return x.defined() && x.is_cuda(); }

// The same memory as a tensor of the CPU, which does not own it. An empty one is a fresh one.
Tensor on_host(const Tensor& x) {
  auto options = x.options().device(at::kCPU);
  if (x.numel() == 0) return Tensor(at::detail::empty_cpu(x.sizes(), options));
  return at::from_blob(x.mutable_data_ptr(), x.sizes(), x.strides(), options);
}

Tensor empty_like(const Tensor& x, DeviceIndex device) {
  c10::DeviceGuard here(Guard::of(device));
  return Tensor(at::detail::empty_strided_generic(
      x.sizes(), x.strides(), &card_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
      x.scalar_type()));
}

void each_tensor(const IValue& value, const std::function<void(const Tensor&)>& look) {
  if (value.isTensor()) look(value.toTensor());
  else if (value.isList())
    for (const IValue& one : value.toListRef()) each_tensor(one, look);
}

IValue to_host(const IValue& value) {
  if (value.isTensor()) {
    const Tensor& x = value.toTensor();
    return on_card(x) ? IValue(on_host(x)) : value;
  }
  if (value.isDevice()) return IValue(Device(at::kCPU));
  if (!value.isList()) return value;
  auto list = value.toList();
  auto out = c10::impl::GenericList(list.elementType());
  for (const IValue& one : value.toListRef()) out.push_back(to_host(one));
  return out;
}

bool waits(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select",
      "aten::_unique2", "aten::is_nonzero", "aten::unique_dim", "aten::unique_consecutive"};
  return names.count(name);
}

// Where all arguments that live on a device are, and a refusal like PyTorch's if that is not one.
DeviceIndex only_device(const std::string& name, const Stack& arguments) {
  DeviceIndex device = -1;
  bool index = name == "aten::index" || name == "aten::index_put_" ||
               name == "aten::_index_put_impl_" || name == "aten::_unsafe_index";
  for (const IValue& argument : arguments)
    each_tensor(argument, [&](const Tensor& x) {
      if (on_card(x)) {
        TORCH_CHECK(device < 0 || device == x.get_device(), "Expected all tensors to be on the "
            "same device, but found at least two devices, cuda:0 and cuda:1! (", name, ")");
        device = x.get_device();
      }
    });
  for (const IValue& argument : arguments)
    each_tensor(argument, [&](const Tensor& x) {
      if (!x.defined() || x.is_cuda() || x.dim() == 0) return;
      TORCH_CHECK(index, "Expected all tensors to be on the same device, but found at least two "
          "devices, cuda:", int(device), " and cpu! (", name, ")");
      wait("an index from the CPU");
    });
  return device;
}

// Products of 16-bit numbers are added in fp32, as tensor cores do; the CPU's own take long.
bool multiplies(const std::string& name) {
  static const std::set<std::string> names = {"aten::convolution", "aten::convolution_backward",
      "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};
  return names.count(name);
}

void run(const c10::OperatorHandle& kernel, Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto& schema = kernel.schema();
  auto type = stack.empty() || !stack[0].isTensor() ? at::kFloat : stack[0].toTensor().scalar_type();
  if (!multiplies(schema.name()) || type == at::kFloat) return kernel.callBoxed(stack);
  auto cast = [](Stack& stack, at::ScalarType type) {
    for (IValue& x : stack)
      if (x.isTensor() && x.toTensor().defined()) x = x.toTensor().to(type);
  };
  Stack given = stack;
  cast(stack, at::kFloat);
  kernel.callBoxed(stack);
  cast(stack, type);
  if (schema.arguments().back().is_out()) {
    given.back().toTensor().copy_(stack[0].toTensor());
    stack[0] = given.back();
  }
}

// Before a captured kernel runs: what it will write to must be restored, and what it reads must
// be there in every replay.
void note_memory(Graph& graph, const c10::FunctionSchema& schema, const Stack& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    auto alias = schema.arguments()[i].alias_info();
    each_tensor(arguments[i], [&](const Tensor& x) {
      if (!on_card(x)) return;
      Block* block = block_of(x);
      if (!block || block->pool == graph.pool) return;
      auto start = static_cast<char*>(x.storage().mutable_data());
      graph.reads.emplace(start, block->serial);
      if (alias && alias->isWrite() && !graph.before.count(start))
        graph.before.emplace(start, std::string(start, block->size));
    });
  }
}

// The same for what the kernel that comes next finds by addresses, and may write to.
void note_addresses(const Tensor& addresses) {
  std::lock_guard<std::recursive_mutex> held(lock);
  Graph* graph = capture_on(addresses.get_device());
  if (!graph) return;
  Tensor found = on_host(addresses).flatten();
  for (int64_t i = 0; i < found.numel(); ++i) {
    auto at = blocks.upper_bound(reinterpret_cast<char*>(found.data_ptr<int64_t>()[i]));
    if (at == blocks.begin()) continue;
    auto& [start, block] = *--at;
    bool inside = found.data_ptr<int64_t>()[i] - reinterpret_cast<int64_t>(start) < block.size;
    if (!inside || block.pool == graph->pool) continue;
    graph->reads.emplace(start, block.serial);
    if (!graph->before.count(start)) graph->before.emplace(start, std::string(start, block.size));
  }
}

// Every operator that PyTorch has no other way to do on CUDA: the CPU's kernel over the same memory.
void launch(const c10::OperatorHandle& kernel, Stack* stack) {
  std::lock_guard<std::recursive_mutex> held(lock);
  const auto& schema = kernel.schema();
  auto given = stack->end() - schema.arguments().size();
  Stack arguments(given, stack->end());
  stack->erase(given, stack->end());
  DeviceIndex device = only_device(schema.name(), arguments);
  if (device < 0) device = device_now;  // it makes a tensor of nothing
  if (waits(schema.name())) wait(schema.name());

  Stack on_host_memory;
  for (const IValue& argument : arguments) on_host_memory.push_back(to_host(argument));
  Graph* graph = capture_on(device);
  Launch launched{kernel, on_host_memory, {}};
  if (graph) note_memory(*graph, schema, arguments);
  Stack results = on_host_memory;
  run(kernel, results);
  for (size_t i = 0; i < arguments.size(); ++i) {  // an "out" that the kernel gave its size
    if (!arguments[i].isTensor() || !on_card(arguments[i].toTensor())) continue;
    const Tensor &mine = arguments[i].toTensor(), theirs = on_host_memory[i].toTensor();
    if (mine.numel() == theirs.numel()) continue;
    mine.resize_({theirs.numel()});
    mine.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides());
    on_host(mine).copy_(theirs);
    launched.arguments[i] = on_host(mine);
  }

  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto alias = schema.returns()[i].alias_info();
    if (alias) {  // one of the arguments, written to
      TORCH_CHECK(alias->isWrite(), schema.name(), ": a view that the pretend card does not know");
      for (size_t j = 0; j < arguments.size(); ++j) {
        auto of = schema.arguments()[j].alias_info();
        if (of && *of == *alias) stack->push_back(arguments[j]);
      }
      continue;
    }
    auto brought = [&](const Tensor& x) {
      if (!x.defined()) return x;
      Tensor y = empty_like(x, device);
      Tensor place = on_host(y);
      place.copy_(x);
      launched.outputs.push_back(place);
      return y;
    };
    const IValue& result = results[i];
    if (result.isTensor()) stack->push_back(brought(result.toTensor()));
    else if (result.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : result.toTensorVector()) list.push_back(brought(x));
      stack->push_back(list);
    } else stack->push_back(result);
  }
  if (graph) graph->launches.push_back(std::move(launched));
}

Tensor& copy_(Tensor& self, const Tensor& src, bool non_blocking) {
  bool up = on_card(self) && !on_card(src), down = !on_card(self) && on_card(src);
  const Tensor& host = up ? src : self;
  if (up || down) {
    bool locked = host.is_pinned();
    if (!locked) wait(up ? "a copy from pageable memory" : "a copy to pageable memory");
    else if (!non_blocking) wait(up ? "a copy to the device" : "a copy from the device");
  }
  std::lock_guard<std::recursive_mutex> held(lock);
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Tensor to = on_card(self) ? on_host(self) : self, from = on_card(src) ? on_host(src) : src;
  Graph* graph = capture_on((on_card(self) ? self : src).get_device());
  if (graph) {
    note_memory(*graph, op.schema(), {self, src, non_blocking});
    graph->launches.push_back({op, {to, from, non_blocking}, {}});
  }
  Stack stack{to, from, non_blocking};
  run(op, stack);
  return self;
}

at::Scalar item(const Tensor& x) {
  wait("a number");
  return on_host(x).item();
}

c10::DispatchKeySet cuda() { return c10::DispatchKeySet(c10::DispatchKey::CUDA); }

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard here(device);
  auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return Tensor(at::detail::empty_generic(size, &card_memory, cuda(), type, format));
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard here(device);
  auto type = dtype.value_or(at::get_default_dtype_as_scalartype());
  return Tensor(at::detail::empty_strided_generic(size, stride, &card_memory, cuda(), type));
}

// ---- for Python --------------------------------------------------------------------------------

int64_t capture_begin(int64_t pool) {
  StreamId stream = streams_now[device_now];
  TORCH_CHECK(stream != 0, "CUDA graphs must be captured on a non-default stream.");
  int64_t id = ++ids;
  graphs[id] = Graph{device_now, pool};
  pools[pool].users++;
  capturing[stream] = id;
  return id;
}

void capture_end(int64_t id) {
  Graph& graph = graphs.at(id);
  std::erase_if(capturing, [&](auto& entry) { return entry.second == id; });
  for (auto& [start, bytes] : graph.before) std::memcpy(start, bytes.data(), bytes.size());
  graph.before.clear();
  for (auto& [start, block] : blocks)
    if (block.pool == graph.pool) std::memset(start, 0xff, block.size);
  TORCH_CHECK(!graph.broken, "CUDA error: operation failed due to a previous error during capture");
  ++captures;
}

void replay(int64_t id) {
  std::lock_guard<std::recursive_mutex> held(lock);
  Graph& graph = graphs.at(id);
  for (auto& [start, serial] : graph.reads) {
    auto found = blocks.find(start);
    TORCH_CHECK(found != blocks.end() && found->second.serial == serial,
        "a CUDA graph reads or writes memory that was given back since it was captured");
  }
  for (const Launch& one : graph.launches) {
    Stack stack = one.arguments;
    run(one.kernel, stack);
    auto place = one.outputs.begin();
    for (const IValue& result : stack)
      each_tensor(result, [&](const Tensor& x) {
        if (place != one.outputs.end() && x.defined()) place++->copy_(x);
      });
  }
  ++replays;
}

void forget(int64_t id) {
  std::lock_guard<std::recursive_mutex> held(lock);
  auto found = graphs.find(id);
  if (found == graphs.end()) return;
  Pool& pool = pools[found->second.pool];
  if (--pool.users == 0) {
    for (char* start : pool.given_back) {
      blocks.erase(start);
      std::free(start);
    }
    pools.erase(found->second.pool);
  }
  graphs.erase(found);
}

void set_device(int64_t device) {
  TORCH_CHECK(device < DEVICES, "CUDA error: invalid device ordinal");
  device_now = device;
}

void set_stream(int64_t id, int64_t device) {
  streams_now[device] = id;
  device_now = device;
}

std::vector<int64_t> memory_stats(int64_t device) {
  Memory& m = memory[device];
  return {int64_t(m.allocated), int64_t(m.peak), int64_t(m.reserved), int64_t(m.peak_reserved),
          int64_t(m.total - m.others - m.reserved), int64_t(m.total)};
}

void set_memory(int64_t device, int64_t total, int64_t others, double fraction) {
  memory[device].total = total;
  memory[device].others = others;
  memory[device].fraction = fraction;
}

void empty_cache(bool peaks) {
  for (Memory& m : memory) {
    m.reserved = 0;
    if (peaks) m.peak = m.peak_reserved = 0;
    count(m);
  }
}

}  // namespace

REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &card_memory)

namespace at {  // where the registry of hooks is
using Hooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&launch>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &item);
  // One kernel each, where PyTorch would do them in parts.
  for (auto name : {"convolution", "convolution_backward", "native_group_norm",
                    "native_group_norm_backward", "native_layer_norm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&launch>());
  // Views: of any memory.
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("set_", &at::native::set_cpu_);
  m.impl("resize_", &at::native::resize_);
}

TORCH_LIBRARY(pretend_card, m) {
  m.def("capture_begin", &capture_begin);
  m.def("capture_end", &capture_end);
  m.def("replay", &replay);
  m.def("forget", &forget);
  m.def("set_device", &set_device);
  m.def("set_stream", &set_stream);
  m.def("device", [] { return int64_t(device_now); });
  m.def("stream", [](int64_t device) { return int64_t(streams_now[device]); });
  m.def("is_capturing", [] { return capture_on(device_now) != nullptr; });
  m.def("counts", [] { return std::vector<int64_t>{captures, replays}; });
  m.def("synchronize", [] { wait("the device"); });
  m.def("memory_stats", &memory_stats);
  m.def("set_memory", &set_memory);
  m.def("empty_cache", &empty_cache);
  m.def("on_host", [](const Tensor& x) { return on_host(x); });
  m.def("call_on_wait", [](int64_t address) {
    on_wait = reinterpret_cast<void (*)(const char*)>(address);
  });
  m.def("note_addresses", &note_addresses);
  m.def("launch(int number, Tensor(a!)[] tensors) -> ()");  // a kernel that Python knows
}

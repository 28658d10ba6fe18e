// A CUDA backend without CUDA, for PyTorch's CPU build: device guard and hooks that do nothing.
//
// Fake tensors (torch._subclasses.FakeTensorMode) have a CUDA device and no data. Their kernels run as shape functions,
// but autograd asks the device's guard for streams and events, and the context for its hooks: without an answer the
// first backward ends in "PyTorch is not linked with support for cuda devices".
//
// PyTorch looks the hooks up once, by the name CUDAHooks, so this library is loaded before `import torch` (library.py).

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

namespace at {

// Host memory that stands for page-locked memory: ordinary, but remembered, so that `is_pinned` tells it apart.
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    char* data = nullptr;
    if (size > 0) {
      data = static_cast<char*>(std::malloc(size));
      if (data == nullptr) throw std::bad_alloc();
      std::lock_guard<std::mutex> lock(mutex());
      blocks()[data] = size;
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }

  static bool holds(const void* data) {
    std::lock_guard<std::mutex> lock(mutex());
    auto behind = blocks().upper_bound(static_cast<const char*>(data));
    if (behind == blocks().begin()) return false;
    --behind;
    return static_cast<const char*>(data) < behind->first + behind->second;
  }

 private:
  static void release(void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      blocks().erase(static_cast<const char*>(data));
    }
    std::free(data);
  }
  // Never destroyed: tensors may be freed after the process's static objects.
  static std::map<const char*, size_t>& blocks() {
    static auto* all = new std::map<const char*, size_t>;
    return *all;
  }
  static std::mutex& mutex() {
    static auto* one = new std::mutex;
    return *one;
  }
};

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static auto* allocator = new Pinned;
    return allocator;
  }
  bool isPinnedPtr(const void* data) const override { return Pinned::holds(data); }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device device(DeviceType::CUDA, 0);

// One device, one stream, and events that have always happened.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return device; }
  Device exchangeDevice(Device) const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  // Any pointer but null says that the event exists; nobody follows it.
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Device*>(&device);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

Guard guard;

[[maybe_unused]] const bool installed = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
  return true;
}();

}  // namespace

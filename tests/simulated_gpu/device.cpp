// A CUDA device that computes nothing, for a PyTorch without CUDA: autograd asks it for streams and threads, and fake
// tensors on `cuda` go through forward and backward as they would on a GPU.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const { return {CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const { return {CUDA, 0}; }
  c10::DeviceIndex deviceCount() const noexcept { return 1; }
  c10::Stream getStream(c10::Device device) const noexcept { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept { return getStream(stream.device()); }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const {}
  void block(void*, const c10::Stream&) const {}
  bool queryEvent(void*) const { return true; }
  bool queryStream(const c10::Stream&) const { return true; }
};

Guard guard;

}  // namespace

namespace at {

struct FakeHooks : CUDAHooksInterface {
  explicit FakeHooks(CUDAHooksArgs) {}
  void init() const {}
  bool hasCUDA() const { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const { return false; }
  int getNumGPUs() const { return 1; }
  c10::DeviceIndex deviceCount() const { return 1; }
  c10::DeviceIndex getCurrentDevice() const { return 0; }
};

// REGISTER_CUDA_HOOKS registers by the class's name; PyTorch looks for "CUDAHooks".
using CUDAHooks = FakeHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

// Called before PyTorch starts, which asks for hooks once; and behind its start.
extern "C" bool take_hooks() { return at::detail::getCUDAHooks().hasCUDA(); }
extern "C" void take_guard() { c10::impl::registerDeviceGuard(CUDA, &guard); }

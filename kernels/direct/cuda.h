// Launches of the kernels that Triton compiled, through CUDA's driver. A plan is what launch.py makes of a call, kept by
// all that it depends on; the driver is looked for at run time, so neither CUDA's headers nor its libraries are needed.
#pragma once
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace cuda {

// The kernels' pointers, by the numbers that direct.py's POINTERS gives them.
enum Pointer { x, grad, out, bits, bias, weight, seed, partials, first, second, all_pointers };
using Pointers = std::array<const void *, all_pointers>;

struct Argument {
  int64_t pointer, value;  // `pointer` < 0: the value itself
};

constexpr size_t most_arguments = 32;

struct Launch {
  void *function;
  unsigned x, y, z, threads, shared;
  std::vector<Argument> arguments;
};

struct Plan {
  std::vector<Launch> launches;     // the kernel and, where anything is summed, the finishing sum
  int64_t sums, partials, channels;  // partial sums: so many of each sum; a sum has a value for each channel
};

// ---------------------------------------------------------------- the driver

struct Driver {
  int (*launch)(
      void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **) = nullptr;
  int (*get_context)(void **) = nullptr;
  int (*set_context)(void *) = nullptr;
  int (*retain_context)(void **, int) = nullptr;
  int (*error)(int, const char **) = nullptr;
  bool found = false;

  Driver() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    found = library && find(library, launch, "cuLaunchKernel") && find(library, get_context, "cuCtxGetCurrent") &&
            find(library, set_context, "cuCtxSetCurrent") && find(library, retain_context, "cuDevicePrimaryCtxRetain") &&
            find(library, error, "cuGetErrorString");
  }

  template <class F> static bool find(void *library, F &function, const char *name) {
    function = (F)dlsym(library, name);
    return function;
  }
};

inline const Driver &driver() {
  static const Driver found;
  return found;
}

inline void check(int status) {
  if (!status) return;
  const char *words = nullptr;
  driver().error(status, &words);
  TORCH_CHECK(false, "CUDA driver error ", status, " in a rectifier's launch: ", words ? words : "unknown");
}

// A thread that has used the first device alone may have no context yet, though torch calls that device current.
inline void need_context(int device) {
  void *context = nullptr;
  check(driver().get_context(&context));
  if (context) return;
  check(driver().retain_context(&context, device));
  check(driver().set_context(context));
}

inline void launch(const Launch &l, const Pointers &pointers, void *stream) {
  std::array<int64_t, most_arguments> values;
  std::array<void *, most_arguments> parameters;
  for (size_t i = 0; i < l.arguments.size(); i++) {
    const Argument &a = l.arguments[i];
    values[i] = a.pointer < 0 ? a.value : (int64_t)pointers[a.pointer];
    parameters[i] = &values[i];  // narrower ones are the first bytes of theirs
  }
  check(driver().launch(l.function, l.x, l.y, l.z, l.threads, 1, 1, l.shared, stream, parameters.data(), nullptr));
}

// ---------------------------------------------------------------- plans and streams, for all threads

struct Key {
  static constexpr size_t most = 40;
  std::array<int64_t, most> parts;
  size_t count = 0;

  bool add(int64_t part) { return count < most && (parts[count++] = part, true); }
  bool operator==(const Key &other) const {
    return count == other.count && std::equal(parts.begin(), parts.begin() + count, other.parts.begin());
  }
};

struct Hash {
  size_t operator()(const Key &key) const {
    uint64_t hash = key.count;
    for (size_t i = 0; i < key.count; i++) hash = (hash ^ (uint64_t)key.parts[i]) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
    return hash;
  }
};

using Planned = std::shared_ptr<const Plan>;  // null: Triton's launcher serves

// Never destroyed: autograd's threads may outlive the library's static objects.
struct Known {
  size_t most = 4096;  // plans; a program of more shapes than that begins again
  std::shared_mutex lock;
  std::unordered_map<Key, Planned, Hash> plans;
  std::map<std::pair<int, int64_t>, void *> streams;  // torch's pool keeps its streams; an external one is its own id

  static Known &all() {
    static auto *known = new Known;
    return *known;
  }

  template <class Map, class Name, class Make> auto get(Map &map, const Name &name, const Make &make) {
    {
      std::shared_lock reading(lock);
      const auto found = map.find(name);
      if (found != map.end()) return found->second;
    }
    auto made = make();
    std::unique_lock writing(lock);
    if (map.size() >= most) map.clear();
    map.insert_or_assign(name, made);
    return made;
  }
};

}  // namespace cuda

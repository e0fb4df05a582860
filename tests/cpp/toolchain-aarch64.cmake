# The core's tests for aarch64, compiled on another machine and run by qemu:
#   cmake -S tests/cpp -B build -DCMAKE_TOOLCHAIN_FILE=tests/cpp/toolchain-aarch64.cmake -DBITMILL_SANITIZE=OFF
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)

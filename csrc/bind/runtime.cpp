// runtime.cpp - what a new compiler's headers call and an old machine's libraries lack, defined here
//
// GCC 9 and 11 moved these functions of libstdc++ out of the headers, and glibc 2.32 brought the
// variable. With our own copies mixkvq._torch, whatever compiled it, loads beside the libstdc++ of
// GCC 5 and later, which is what the tag of a manylinux wheel promises. The linker script hides them.
#include <sstream>

#ifdef __GLIBCXX__
#include <new>
#include <string>

template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
#if _GLIBCXX_RELEASE >= 11 // before, str() had no reference qualifiers
template std::string std::stringbuf::str() const &;
template std::string std::stringbuf::str() &&;
#endif

namespace std
{
void __throw_bad_array_new_length()
{
    throw std::bad_array_new_length();
}
} // namespace std

// "there may be other threads": reference counts are then always atomic
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}
#endif

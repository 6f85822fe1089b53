/* Makes the memory of a paused guest stand still while the guest goes on: loaded into the VMM (LD_PRELOAD).
 *
 * The memory of a guest is a memfd that the VMM has mapped shared. Told to by a signal, this maps the same memfd at the same
 * address once more, private: what the memfd holds from then on is the memory of that moment, and the guest writes to
 * copies of its pages. That takes some microseconds whatever the size of the memory.
 *
 * The signal is SIGNAL, queued (sigqueue(3)) with a value: bits 12 and up are the address, bits 0 to 11 the VMM's descriptor
 * of the memfd. Who sends it believes nothing of the VMM afterwards: whether the memfd is mapped shared any more the
 * kernel says when it is sealed.
 *
 * Without a C library, and of one source: see scripts/build-native.sh.
 */

typedef unsigned long u64;
typedef long i64;

enum { SYS_fstat = 5, SYS_mmap = 9, SYS_munmap = 11, SYS_rt_sigaction = 13, SYS_mremap = 25, SYS_madvise = 28 };

#define SIGNAL 63
#define SI_QUEUE (-1)
#define SA_SIGINFO 0x4
#define SA_RESTORER 0x04000000
#define SA_RESTART 0x10000000
#define PROT_READ_WRITE 3
#define MAP_PRIVATE 2
#define MAP_NORESERVE 0x4000
#define MREMAP_MAYMOVE 1
#define MREMAP_FIXED 2
#define MADV_DONTFORK 10
#define MADV_DONTDUMP 16

static i64 sys(i64 n, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f)
{
    i64 out;
    register i64 r10 __asm__("r10") = d;
    register i64 r8 __asm__("r8") = e;
    register i64 r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(out) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return out;
}

struct info { int number, error, code, pad, pid, uid; u64 value; };
struct action { void (*handler)(int, struct info *, void *); u64 flags; void (*restorer)(void); u64 mask; };
struct status { u64 head[6]; u64 size; u64 rest[11]; };

static void freeze(int number, struct info *info, void *context)
{
    struct status status;
    i64 fd, address = (i64)(info->value & ~0xffful), fresh;

    (void)number;
    (void)context;
    if (info->code != SI_QUEUE)
        return;
    fd = (i64)(info->value & 0xfff);
    if (sys(SYS_fstat, fd, (i64)&status, 0, 0, 0, 0) < 0)
        return;
    /* elsewhere first: should there be no room for it, the old one is still whole */
    fresh = sys(SYS_mmap, 0, (i64)status.size, PROT_READ_WRITE, MAP_PRIVATE | MAP_NORESERVE, fd, 0);
    if (fresh < 0)
        return;
    sys(SYS_madvise, fresh, (i64)status.size, MADV_DONTFORK, 0, 0, 0);
    sys(SYS_madvise, fresh, (i64)status.size, MADV_DONTDUMP, 0, 0, 0);
    if (sys(SYS_mremap, fresh, (i64)status.size, (i64)status.size, MREMAP_MAYMOVE | MREMAP_FIXED, address, 0) != address)
        sys(SYS_munmap, fresh, (i64)status.size, 0, 0, 0, 0);
}

__asm__(".type back, @function\nback:\n\tmov $15, %eax\n\tsyscall\n");
extern void back(void) __attribute__((visibility("hidden")));

__attribute__((constructor)) static void begin(void)
{
    struct action action = {freeze, SA_SIGINFO | SA_RESTORER | SA_RESTART, back, 0};
    sys(SYS_rt_sigaction, SIGNAL, (i64)&action, 0, 8, 0, 0);
}

#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST "unknown"
#endif
/* by this a stale binary is told from a fresh one */
__attribute__((used)) static const char source[] = "freeze.c sha256:" SOURCE_DIGEST;

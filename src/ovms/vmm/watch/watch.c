/* Starts a VMM in its jail, watches it, and keeps what it says: what there is of ovms beside a running VM.
 *
 *     watch OPTION... -- PROGRAM ARGUMENT...
 *
 * Three processes come of it, none larger than some pages:
 *
 *     watcher   the parent of the VMM. Reads nothing that the VMM says; waits for its end, writes how it ended, and runs
 *               what is to be run then. It alone keeps the privileges of whoever started it.
 *     copier    carries the console, the VMM's events and its stderr into files and to whoever looks. It has no
 *               capabilities, and may make the few system calls that this takes (no open, no exec): what a hostile VMM
 *               sends it can do nothing.
 *     PROGRAM   the VMM: in namespaces of its own, under a user of its own, without capabilities, with the descriptors
 *               that it is given and no others.
 *
 * The first process answers on stdout with one line and ends, so that nobody waits for a VM:
 *
 *     ok VMM-PID WATCHER-PID
 *     error STAGE ERRNO
 *
 * Written without a C library, so that it is one small file that runs everywhere: "make native" builds it, and the
 * result lies beside it. Options are words "name=value"; descriptors are numbers that were inherited.
 *
 *     dir=FD                 the instance's directory; vmm.pid and exit are written there
 *     console=FD listen=FD   our end of the serial console; the socket on which others ask for it
 *     events=FD              our end of a QMP channel; it is negotiated, and what comes is written down
 *     log=FD old=FD index=FD old-index=FD   console.log, console.log.1 and their time indexes: what comes is added
 *     said=FD event-log=FD   files for the VMM's stderr and its events
 *     log-max=BYTES          when console.log is this large, it becomes console.log.1
 *     keep=FD                inherited by the VMM (repeated)
 *     hold=FD                kept open by the watcher (repeated)
 *     until=FD               a pidfd: when that process has ended, the VMM is killed; and it is, when the watcher is
 *     lock=FD                a file in memory: what there is of it is not swapped out as long as the watcher lives
 *     cgroup=FD              a cgroup.procs file that the VMM's number is written to (repeated)
 *     ns=MASK                CLONE_NEW* flags, a decimal number
 *     user=UID:GID           the user of the VMM, on the host
 *     root=DIR               a directory of the host to build the VMM's own root on (mounted over, seen by nobody else)
 *     tree=NAME:PATH         a directory or file of that root: what is at PATH of the host, read-only (repeated)
 *     share=FD/NAME:PATH     a directory of that root that the VMM may write to: FD is the one at PATH of the host, open. As
 *                            root it is the user of the VMM, in there, who owns what its owner owns (repeated)
 *     dev=NAME:PATH          a device node of that root (repeated)
 *     link=NAME:TARGET       a symbolic link of that root (repeated)
 *     sealed=FD:PATH         FD, which is kept, is opened anew through a read-only mount of PATH: who owns the file could
 *                            otherwise change its mode, and write to it through /proc (repeated; with root= only)
 *     limit=RESOURCE:VALUE   setrlimit, both (repeated)
 *     seccomp=0              no filter of ours
 *     env=NAME=VALUE         a variable of the VMM's environment, beside those that we have (repeated)
 *     at-end=WORD            a program and its arguments, run by the watcher when the VMM has ended (repeated)
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

/* --- the kernel's interface, x86-64 ------------------------------------------------------------------------------- */

enum {
    SYS_read = 0, SYS_write = 1, SYS_close = 3, SYS_poll = 7, SYS_lseek = 8, SYS_rt_sigaction = 13,
    SYS_rt_sigprocmask = 14, SYS_pipe2 = 293, SYS_sendfile = 40, SYS_clone = 56, SYS_fork = 57, SYS_execve = 59,
    SYS_exit = 60, SYS_wait4 = 61, SYS_fcntl = 72, SYS_ftruncate = 77, SYS_chdir = 80, SYS_setsid = 112,
    SYS_setgroups = 116, SYS_setresuid = 117, SYS_setresgid = 119, SYS_capset = 126, SYS_pivot_root = 155,
    SYS_prctl = 157, SYS_setrlimit = 160, SYS_mount = 165, SYS_umount2 = 166, SYS_sethostname = 170,
    SYS_clock_gettime = 228, SYS_exit_group = 231, SYS_openat = 257, SYS_mkdirat = 258, SYS_unlinkat = 263,
    SYS_renameat = 264, SYS_symlinkat = 266, SYS_accept4 = 288, SYS_dup3 = 292, SYS_getpid = 39, SYS_kill = 62,
    SYS_mmap = 9, SYS_munmap = 11, SYS_getrlimit = 97, SYS_mlock2 = 325, SYS_sendto = 44, SYS_recvfrom = 45, SYS_fstat = 5, SYS_close_range = 436, SYS_mount_setattr = 442, SYS_umask = 95,
    SYS_pidfd_open = 434, SYS_open = 2, SYS_creat = 85, SYS_chmod = 90, SYS_fchmod = 91, SYS_mknod = 133, SYS_mknodat = 259, SYS_fchmodat = 268,
    SYS_fchmodat2 = 452, SYS_geteuid = 107, SYS_getegid = 108, SYS_open_tree = 428, SYS_move_mount = 429,
    SYS_openat2 = 437, SYS_landlock_create_ruleset = 444, SYS_landlock_add_rule = 445, SYS_landlock_restrict_self = 446,
};

static i64 sys6(i64 n, i64 a, i64 b, i64 c, i64 d, i64 e, i64 f)
{
    i64 out;
    register i64 r10 __asm__("r10") = d;
    register i64 r8 __asm__("r8") = e;
    register i64 r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(out) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return out;
}
#define sys(n, a, b, c, d, e) sys6(n, (i64)(a), (i64)(b), (i64)(c), (i64)(d), (i64)(e), 0)

#define AT_FDCWD (-100)
#define AT_EMPTY_PATH 0x1000
#define AT_RECURSIVE 0x8000
#define O_WRONLY 01
#define O_CREAT 0100
#define O_TRUNC 01000
#define O_DIRECTORY 0200000
#define O_NOFOLLOW 0400000
#define O_CLOEXEC 02000000
#define O_PATH 010000000
#define F_SETFD 2
#define F_SETFL 4
#define O_NONBLOCK 04000
#define SEEK_SET 0
#define SEEK_END 2
#define SEEK_DATA 3
#define SEEK_HOLE 4
#define PROT_READ 1
#define MAP_PRIVATE 2
#define MLOCK_ONFAULT 1
#define RLIMIT_MEMLOCK 8
#define EAGAIN 11
#define EINTR 4
#define EPERM 1
#define ENOSYS 38
#define EINVAL 22
#define EOPNOTSUPP 95
#define MSG_DONTWAIT 0x40
#define MSG_NOSIGNAL 0x4000
#define POLLIN 1
#define POLLOUT 4
#define POLLERR 8
#define POLLHUP 16
#define SIGCHLD 17
#define CLONE_NEWNS 0x20000
#define CLONE_NEWUSER 0x10000000
#define CLONE_NEWUTS 0x4000000
#define CLONE_NEWPID 0x20000000
#define CLOSE_RANGE_CLOEXEC 4
#define MS_RDONLY 1
#define MS_NOSUID 2
#define MS_NODEV 4
#define MS_NOEXEC 8
#define MS_BIND 4096
#define MS_REC 16384
#define MS_PRIVATE (1 << 18)
#define MNT_DETACH 2
#define MOUNT_ATTR_RDONLY 1
#define MOUNT_ATTR_NOSUID 2
#define MOUNT_ATTR_NODEV 4
#define MOUNT_ATTR_NOEXEC 8
#define MOUNT_ATTR_IDMAP 0x100000
#define MOUNT_ATTR_NOSYMFOLLOW 0x200000
#define OPEN_TREE_CLONE 1
#define MOVE_MOUNT_F_EMPTY_PATH 4
#define PR_SET_PDEATHSIG 1
#define PR_SET_DUMPABLE 4
#define PR_SET_SECCOMP 22
#define PR_CAPBSET_DROP 24
#define PR_SET_SECUREBITS 28
#define PR_SET_NO_NEW_PRIVS 38
#define PR_CAP_AMBIENT 47
#define SECCOMP_MODE_FILTER 2
#define RLIMIT_CORE 4

struct pollfd { int fd; short events, revents; };
struct timespec { i64 sec, nsec; };
struct timeval { i64 sec, usec; };
struct rusage { struct timeval user, system; i64 maxrss, rest[13]; };
struct rlimit { u64 soft, hard; };
struct mount_attr { u64 set, clear, propagation, userns; };
struct filter { u16 code; u8 jt, jf; u32 k; };
struct program { u16 count; struct filter *filters; };

void *memset(void *to, int value, u64 count)
{
    u8 *p = to;
    while (count--)
        *p++ = (u8)value;
    return to;
}

void *memcpy(void *to, const void *from, u64 count)
{
    u8 *p = to;
    const u8 *q = from;
    while (count--)
        *p++ = *q++;
    return to;
}

#define SIG_DFL ((void *)0)
#define SIG_IGN ((void *)1)

static void on_signals(void *handler)
{
    struct { void *handler; u64 flags; void *restorer; u64 mask; } action = {handler, 0, 0, 0};
    static const u8 numbers[] = {1 /* HUP */, 2 /* INT */, 3 /* QUIT */, 13 /* PIPE */, 15 /* TERM */};
    for (u64 i = 0; i < sizeof numbers; i++)
        sys(SYS_rt_sigaction, numbers[i], &action, 0, 8, 0);
}

/* --- words and numbers ------------------------------------------------------------------------------------------- */

/* The value of "name=value", or 0. */
static char *value_of(char *word, const char *name)
{
    while (*name && *word == *name)
        word++, name++;
    return *name == 0 && *word == '=' ? word + 1 : 0;
}

/* Reads a decimal number; *text then stands behind it. */
static u64 number(char **text)
{
    u64 n = 0;
    while (**text >= '0' && **text <= '9')
        n = n * 10 + (u64)(*(*text)++ - '0');
    return n;
}

struct text { char bytes[512]; u64 used; };

static void add(struct text *out, const char *word)
{
    while (*word && out->used < sizeof out->bytes - 1)
        out->bytes[out->used++] = *word++;
    out->bytes[out->used] = 0;
}

static void add_number(struct text *out, u64 n)
{
    char digits[24];
    int at = 23;
    digits[at] = 0;
    do
        digits[--at] = (char)('0' + n % 10);
    while (n /= 10);
    add(out, digits + at);
}

/* Closes every descriptor but those of the list (which it sorts); -1 stands for none. */
static void close_all_but(int *kept, int count)
{
    for (int i = 1; i < count; i++)
        for (int j = i; j > 0 && kept[j] < kept[j - 1]; j--) {
            int t = kept[j];
            kept[j] = kept[j - 1], kept[j - 1] = t;
        }
    u32 next = 0;
    for (int i = 0; i < count; i++) {
        if (kept[i] < 0)
            continue;
        if ((u32)kept[i] > next)
            sys(SYS_close_range, next, kept[i] - 1, 0, 0, 0);
        next = (u32)kept[i] + 1;
    }
    sys(SYS_close_range, next, ~0u, 0, 0, 0);
}

/* --- what was asked for ------------------------------------------------------------------------------------------ */

#define MANY 160

struct mapping { char *name, *path; };
struct list { int count; int fd[MANY]; };
struct maps { int count; struct mapping item[MANY]; };

static struct {
    int dir, console, listen, events, log, old, index, old_index, said, event_log, lock, until;
    u64 log_max, ns, uid, gid;
    int has_user, seccomp;
    char *root;
    struct list keep, hold, cgroups;
    struct maps trees, devs, links, sealed, shares;
    i64 share[MANY]; /* a mount of each that is nowhere yet, or -1 */
    int limits;
    struct { int resource; u64 value; } limit[16];
    int at_end_count;
    char *at_end[MANY];
    int variables;
    char *variable[MANY];
    char **program;
} o;

static void put_fd(struct list *list, char *value)
{
    if (list->count < MANY)
        list->fd[list->count++] = (int)number(&value);
}

static void put_map(struct maps *maps, char *value)
{
    if (maps->count == MANY)
        return;
    struct mapping *item = &maps->item[maps->count++];
    item->name = value;
    while (*value && *value != ':')
        value++;
    if (*value)
        *value++ = 0;
    item->path = value;
}

static int parse(char **words)
{
    static const struct { const char *name; int *to; } numbers[] = {
        {"dir", &o.dir}, {"console", &o.console}, {"listen", &o.listen}, {"events", &o.events}, {"log", &o.log},
        {"old", &o.old}, {"index", &o.index}, {"old-index", &o.old_index}, {"said", &o.said},
        {"event-log", &o.event_log}, {"seccomp", &o.seccomp}, {"lock", &o.lock},
        {"until", &o.until},
    };
    for (u64 i = 0; i < sizeof numbers / sizeof *numbers; i++)
        *numbers[i].to = -1;
    o.seccomp = 1;
    for (; *words; words++) {
        char *v, *word = *words;
        if (word[0] == '-' && word[1] == '-' && !word[2]) {
            o.program = words + 1;
            return o.program[0] != 0;
        }
        int found = 0;
        for (u64 i = 0; i < sizeof numbers / sizeof *numbers && !found; i++)
            if ((v = value_of(word, numbers[i].name)))
                *numbers[i].to = (int)number(&v), found = 1;
        if (found)
            continue;
        if ((v = value_of(word, "log-max")))
            o.log_max = number(&v);
        else if ((v = value_of(word, "ns")))
            o.ns = number(&v);
        else if ((v = value_of(word, "user")))
            o.uid = number(&v), v++, o.gid = number(&v), o.has_user = 1;
        else if ((v = value_of(word, "root")))
            o.root = v;
        else if ((v = value_of(word, "keep")))
            put_fd(&o.keep, v);
        else if ((v = value_of(word, "hold")))
            put_fd(&o.hold, v);
        else if ((v = value_of(word, "cgroup")))
            put_fd(&o.cgroups, v);
        else if ((v = value_of(word, "tree")))
            put_map(&o.trees, v);
        else if ((v = value_of(word, "dev")))
            put_map(&o.devs, v);
        else if ((v = value_of(word, "share")))
            put_map(&o.shares, v);
        else if ((v = value_of(word, "sealed")))
            put_map(&o.sealed, v);
        else if ((v = value_of(word, "link")))
            put_map(&o.links, v);
        else if ((v = value_of(word, "limit")) && o.limits < 16)
            o.limit[o.limits].resource = (int)number(&v), v++, o.limit[o.limits++].value = number(&v);
        else if ((v = value_of(word, "at-end")) && o.at_end_count < MANY - 1)
            o.at_end[o.at_end_count++] = v;
        else if ((v = value_of(word, "env")) && o.variables < MANY / 2)
            o.variable[o.variables++] = v;
        else
            return 0;
    }
    return 0;
}

/* --- the VMM's side ---------------------------------------------------------------------------------------------- */

static int status_pipe[2];

static void fail(const char *stage, i64 result)
{
    struct text out = {.used = 0};
    add(&out, "error ");
    add(&out, stage);
    add(&out, " ");
    add_number(&out, (u64)-result);
    add(&out, "\n");
    sys(SYS_write, status_pipe[1], out.bytes, out.used, 0, 0);
    sys(SYS_exit_group, 127, 0, 0, 0, 0);
}

static void must(i64 result, const char *stage)
{
    if (result < 0)
        fail(stage, result);
}

/* Makes the directories that lead to *name* (and the last part, too, when *whole*), below the current directory. */
static void make_parents(const char *name, int whole)
{
    struct text path = {.used = 0};
    for (const char *p = name; *p; p++) {
        if (*p == '/' && path.used)
            sys(SYS_mkdirat, AT_FDCWD, path.bytes, 0755, 0, 0);
        char one[2] = {*p, 0};
        add(&path, one);
    }
    if (whole)
        sys(SYS_mkdirat, AT_FDCWD, path.bytes, 0755, 0, 0);
}

static void bind(struct mapping *item, u64 attributes)
{
    /* by its name: what a descriptor of the parent leads to is of another mount namespace, and can't be bound here */
    i64 fd = sys(SYS_openat, AT_FDCWD, item->path, O_PATH | O_CLOEXEC, 0, 0);
    must(fd, "tree");
    u32 info[36];
    must(sys(SYS_fstat, fd, info, 0, 0, 0), "tree");
    int directory = (info[6] & 0170000) == 0040000; /* st_mode */
    make_parents(item->name, directory);
    if (!directory) {
        i64 file = sys(SYS_openat, AT_FDCWD, item->name, O_WRONLY | O_CREAT | O_CLOEXEC, 0600, 0);
        must(file, "root");
        sys(SYS_close, file, 0, 0, 0, 0);
    }
    sys(SYS_close, fd, 0, 0, 0, 0);
    must(sys(SYS_mount, item->path, item->name, 0, MS_BIND | MS_REC, 0), "bind");
    struct mount_attr attr = {.set = attributes};
    must(sys(SYS_mount_setattr, AT_FDCWD, item->name, AT_RECURSIVE, &attr, sizeof attr), "bind-read-only");
}

/* --- directories that are written to --- */

static struct mapping share_of(int i, int *fd)
{
    struct mapping share = o.shares.item[i];
    *fd = (int)number(&share.name);
    share.name++;
    return share;
}

/* A mount of the directory and of what is mounted in it, which is nowhere yet; what a guest puts there starts nothing. */
static i64 tree_of(i64 fd)
{
    i64 tree = sys(SYS_open_tree, fd, "", OPEN_TREE_CLONE | O_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE, 0, 0);
    must(tree, "share");
    struct mount_attr attr = {
        .set = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW,
        .propagation = MS_PRIVATE, /* what the host mounts in there later is none of the VM's */
    };
    i64 result = sys(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
    if (result == -EINVAL) { /* Linux before 5.14 */
        attr.set &= ~(u64)MOUNT_ATTR_NOSYMFOLLOW;
        result = sys(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr);
    }
    must(result, "share");
    return tree;
}

/* By the VMM's side: the mount that root has made, or, where a user has started us, one of the same directory. */
static void mount_share(int i)
{
    int fd;
    struct mapping share = share_of(i, &fd);
    i64 tree = o.share[i];
    if (tree < 0) {
        u64 before[18], after[18];
        i64 again = sys(SYS_openat, AT_FDCWD, share.path, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0, 0);
        must(again, "share");
        must(sys(SYS_fstat, fd, before, 0, 0, 0), "share");
        must(sys(SYS_fstat, again, after, 0, 0, 0), "share");
        if (before[0] != after[0] || before[1] != after[1]) /* st_dev, st_ino */
            fail("share", -EINVAL);
        tree = tree_of(again);
    }
    make_parents(share.name, 1);
    must(sys(SYS_move_mount, tree, "", AT_FDCWD, share.name, MOVE_MOUNT_F_EMPTY_PATH), "share");
}

/* The same file, or nothing. */
static void seal(struct mapping *item)
{
    u64 before[18], after[18];
    char *number_of = item->name;
    int fd = (int)number(&number_of);
    struct mapping place = {"sealed", item->path};
    must(sys(SYS_fstat, fd, before, 0, 0, 0), "seal");
    bind(&place, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    i64 again = sys(SYS_openat, AT_FDCWD, place.name, O_CLOEXEC | O_NOFOLLOW, 0, 0);
    must(again, "seal");
    must(sys(SYS_fstat, again, after, 0, 0, 0), "seal");
    if (before[0] != after[0] || before[1] != after[1]) /* st_dev, st_ino */
        fail("seal", -EINVAL);
    must(sys(SYS_dup3, again, fd, O_CLOEXEC, 0, 0), "seal");
    sys(SYS_close, again, 0, 0, 0, 0);
    must(sys(SYS_umount2, place.name, MNT_DETACH, 0, 0, 0), "seal");
    sys(SYS_unlinkat, AT_FDCWD, place.name, 0, 0, 0);
}

static void make_root(void)
{
    must(sys(SYS_mount, 0, "/", 0, MS_REC | MS_PRIVATE, 0), "mount-private");
    must(sys(SYS_mount, "root", o.root, "tmpfs", MS_NOSUID | MS_NODEV, "size=4m,nr_inodes=1k,mode=755"), "root");
    must(sys(SYS_chdir, o.root, 0, 0, 0, 0), "root");
    /* before the trees: one of them may lie in the host's, a program that was built there */
    sys(SYS_mkdirat, AT_FDCWD, "tmp", 01777, 0, 0);
    must(sys(SYS_mount, "tmp", "tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=1m,nr_inodes=64,mode=1777"),
         "tmp");
    for (int i = 0; i < o.trees.count; i++)
        bind(&o.trees.item[i], MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
    for (int i = 0; i < o.shares.count; i++)
        mount_share(i);
    for (int i = 0; i < o.devs.count; i++)
        bind(&o.devs.item[i], MOUNT_ATTR_NOSUID);
    for (int i = 0; i < o.sealed.count; i++)
        seal(&o.sealed.item[i]);
    for (int i = 0; i < o.links.count; i++) {
        make_parents(o.links.item[i].name, 0);
        must(sys(SYS_symlinkat, o.links.item[i].path, AT_FDCWD, o.links.item[i].name, 0, 0), "link");
    }
    sys(SYS_mkdirat, AT_FDCWD, "proc", 0755, 0, 0);
    must(sys(SYS_mount, "proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, 0), "proc");
    must(sys(SYS_pivot_root, ".", ".", 0, 0, 0), "pivot");
    must(sys(SYS_umount2, ".", MNT_DETACH, 0, 0, 0), "pivot");
    must(sys(SYS_chdir, "/", 0, 0, 0, 0), "pivot");
    struct mount_attr attr = {.set = MOUNT_ATTR_RDONLY};
    must(sys(SYS_mount_setattr, AT_FDCWD, "/", 0, &attr, sizeof attr), "root-read-only");
}

#define INSIDE 1000 /* what the user is called inside its namespace; vmm/jail.py knows it, too */

static void become_user(void)
{
    if (!o.has_user)
        return;
    u64 uid = o.ns & CLONE_NEWUSER ? INSIDE : o.uid, gid = o.ns & CLONE_NEWUSER ? INSIDE : o.gid;
    /* not allowed (and not needed) where a user without privileges has mapped itself */
    i64 result = sys(SYS_setgroups, 0, 0, 0, 0, 0);
    if (result != -EPERM || !(o.ns & CLONE_NEWUSER))
        must(result, "groups");
    must(sys(SYS_setresgid, gid, gid, gid, 0, 0), "group");
    must(sys(SYS_setresuid, uid, uid, uid, 0, 0), "user");
}

/* No program that is run later gains a capability. Needs CAP_SETPCAP; who lacks it has none to lose (capset below counts). */
static void limit_capabilities(void)
{
    for (int i = 0; i < 64; i++)
        sys(SYS_prctl, PR_CAPBSET_DROP, i, 0, 0, 0);
    sys(SYS_prctl, PR_CAP_AMBIENT, 4 /* clear all */, 0, 0, 0);
    /* root is nobody special, a change of user changes no capability, none is kept, none is ambient: all locked */
    sys(SYS_prctl, PR_SET_SECUREBITS, 0xef, 0, 0, 0);
}

static void drop_capabilities(void)
{
    u32 header[2] = {0x20080522, 0};
    u32 none[6] = {0};
    must(sys(SYS_capset, header, none, 0, 0, 0), "capabilities");
    must(sys(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no-new-privs");
}

/* seccomp: LD = load a word of the call's data, JEQ/JGE/JSET = compare, RET = the verdict */
#define LOAD(offset) {0x20, 0, 0, offset}
#define JEQ(value, yes, no) {0x15, yes, no, value}
#define JGE(value, yes, no) {0x35, yes, no, value}
#define JSET(value, yes, no) {0x45, yes, no, value}
#define AND(value) {0x54, 0, 0, value}
#define RET(value) {0x06, 0, 0, value}
#define ALLOW 0x7fff0000u
#define KILL 0x80000000u
#define ERRNO(n) (0x50000u | (n))
#define X86_64 0xc000003eu

static void install(struct filter *filters, u64 count)
{
    struct program program = {(u16)count, filters};
    must(sys(SYS_prctl, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program, 0, 0), "seccomp");
}

/* What no VMM needs, and what attacks on the kernel begin with. QEMU's own filter forbids more, once it runs. */
static const u16 forbidden[] = {
    101 /* ptrace */, 310 /* process_vm_readv */, 311 /* process_vm_writev */, 312 /* kcmp */, 165 /* mount */,
    166 /* umount2 */, 155 /* pivot_root */, 161 /* chroot */, 428 /* open_tree */, 429 /* move_mount */,
    430 /* fsopen */, 431 /* fsconfig */, 432 /* fsmount */, 433 /* fspick */, 442 /* mount_setattr */,
    272 /* unshare */, 308 /* setns */, 246 /* kexec_load */, 320 /* kexec_file_load */, 175 /* init_module */,
    313 /* finit_module */, 176 /* delete_module */, 321 /* bpf */, 298 /* perf_event_open */, 323 /* userfaultfd */,
    248 /* add_key */, 249 /* request_key */, 250 /* keyctl */, 169 /* reboot */, 167 /* swapon */, 168 /* swapoff */,
    163 /* acct */, 164 /* settimeofday */, 227 /* clock_settime */, 305 /* clock_adjtime */, 159 /* adjtimex */,
    172 /* iopl */, 173 /* ioperm */, 154 /* modify_ldt */, 179 /* quotactl */, 443 /* quotactl_fd */,
    303 /* name_to_handle_at */, 304 /* open_by_handle_at */, 425 /* io_uring_setup */, 426 /* io_uring_enter */,
    427 /* io_uring_register */, 170 /* sethostname */, 171 /* setdomainname */, 103 /* syslog */,
    153 /* vhangup */, 300 /* fanotify_init */, 256 /* migrate_pages */, 279 /* move_pages */, 135 /* personality */,
    438 /* pidfd_getfd */, 440 /* process_madvise */, 448 /* process_mrelease */,
};

/* What makes a file, or changes its mode: where its flags are among the call's data (0: it has none), and where the mode is. */
static const struct { u16 call; u8 flags, mode; } with_mode[] = {
    {SYS_open, 24, 32}, {SYS_openat, 32, 40}, {SYS_creat, 0, 24}, {SYS_chmod, 0, 24}, {SYS_fchmod, 0, 24},
    {SYS_fchmodat, 0, 32}, {SYS_fchmodat2, 0, 32}, {SYS_mknod, 0, 24}, {SYS_mknodat, 0, 32},
};
/* Some of a file's extended attributes are rights or labels, and which one is meant lies in memory. */
static const u16 attributes[] = {188 /* setxattr */, 189 /* lsetxattr */, 190 /* fsetxattr */, 463 /* setxattrat */};
#define MAKES_FILE (O_CREAT | 020000000u /* __O_TMPFILE */)
#define SET_ID 06000u
#define KIND 0170000u
#define REGULAR 0100000u

#define NEW_NAMESPACES 0x7e020000u /* CLONE_NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET */

static void filter_vmm(void)
{
    enum { N = sizeof forbidden / sizeof *forbidden };
    enum { MODES = sizeof with_mode / sizeof *with_mode, ATTRIBUTES = sizeof attributes / sizeof *attributes };
    struct filter filters[N * 2 + MODES * 12 + ATTRIBUTES * 2 + 24];
    u64 n = 0;
#define PUT(...) filters[n++] = (struct filter)__VA_ARGS__
    PUT(LOAD(4));
    PUT(JEQ(X86_64, 1, 0));
    PUT(RET(KILL));
    PUT(LOAD(0));
    PUT(JGE(0x40000000u, 0, 1)); /* the x32 interface: the same calls under other numbers */
    PUT(RET(KILL));
    for (int i = 0; i < N; i++) {
        PUT(JEQ(forbidden[i], 0, 1));
        PUT(RET(ERRNO(EPERM)));
    }
    PUT(JEQ(435, 0, 1)); /* clone3, whose flags lie in memory: the C library falls back on clone */
    PUT(RET(ERRNO(ENOSYS)));
    PUT(JEQ(SYS_openat2, 0, 1)); /* its mode lies in memory, too: who calls it falls back on openat */
    PUT(RET(ERRNO(ENOSYS)));
    /* In a directory of the host's that a guest writes to, no file of set-user-ID or set-group-ID, no device, no FIFO: a mount's
       flags keep us from using them, and nobody else. (mkdir can set neither bit.) */
    for (int i = 0; i < MODES; i++) {
        int nodes = with_mode[i].call == SYS_mknod || with_mode[i].call == SYS_mknodat;
        PUT(JEQ(with_mode[i].call, 0, (u8)(4 + (with_mode[i].flags ? 3 : 0) + (nodes ? 4 : 0))));
        if (with_mode[i].flags) {
            PUT(LOAD(with_mode[i].flags));
            PUT(JSET(MAKES_FILE, 1, 0));
            PUT(RET(ALLOW));
        }
        PUT(LOAD(with_mode[i].mode));
        PUT(JSET(SET_ID, 0, 1));
        PUT(RET(ERRNO(EPERM)));
        if (nodes) {
            PUT(AND(KIND));
            PUT(JEQ(0, 2, 0)); /* a regular file, too */
            PUT(JEQ(REGULAR, 1, 0));
            PUT(RET(ERRNO(EPERM)));
        }
        PUT(RET(ALLOW));
    }
    for (int i = 0; i < ATTRIBUTES; i++) {
        PUT(JEQ(attributes[i], 0, 1));
        PUT(RET(ERRNO(EOPNOTSUPP)));
    }
    PUT(JEQ(SYS_clone, 0, 3));
    PUT(LOAD(16));
    PUT(JSET(NEW_NAMESPACES, 0, 1));
    PUT(RET(ERRNO(EPERM)));
    PUT(RET(ALLOW));
    install(filters, n);
}

/* Of what a guest could leave in a directory of the host's, what no filter of calls can see: a socket comes of bind. */
static void filter_files(void)
{
    enum { MAKE_CHAR = 1 << 6, MAKE_SOCK = 1 << 9, MAKE_FIFO = 1 << 10, MAKE_BLOCK = 1 << 11, REFER = 1 << 13 };
    i64 version = sys(SYS_landlock_create_ruleset, 0, 0, 1 /* LANDLOCK_CREATE_RULESET_VERSION */, 0, 0);
    if (version < 2) /* not in this kernel, or one in which a file could no longer be moved to another directory */
        return;
    u64 handled = MAKE_CHAR | MAKE_SOCK | MAKE_FIFO | MAKE_BLOCK | REFER;
    i64 rules = sys(SYS_landlock_create_ruleset, &handled, sizeof handled, 0, 0, 0);
    must(rules, "landlock");
    for (int i = 0; i < o.shares.count; i++) {
        int fd;
        struct __attribute__((packed)) { u64 allowed; int directory; } rule = {REFER, -1};
        rule.directory = (int)sys(SYS_openat, AT_FDCWD, share_of(i, &fd).name, O_PATH | O_CLOEXEC, 0, 0);
        must(rule.directory, "share");
        must(sys(SYS_landlock_add_rule, rules, 1 /* LANDLOCK_RULE_PATH_BENEATH */, &rule, 0, 0), "landlock");
    }
    must(sys(SYS_landlock_restrict_self, rules, 0, 0, 0, 0), "landlock");
}

static void run_program(int go, int said, char **environment)
{
    u8 byte;
    /* until the maps of the user namespace are written, and the cgroups joined */
    if (sys(SYS_read, go, &byte, 1, 0, 0) != 1)
        sys(SYS_exit_group, 127, 0, 0, 0, 0);
    sys(SYS_setsid, 0, 0, 0, 0, 0);
    sys(SYS_umask, 022, 0, 0, 0, 0); /* without a user namespace its root is made by another than who is to look into it */
    on_signals(SIG_DFL);
    if (o.ns & CLONE_NEWUSER)
        become_user();
    if (o.root)
        make_root();
    sys(SYS_umask, 077, 0, 0, 0, 0);
    if (o.ns & CLONE_NEWUTS)
        must(sys(SYS_sethostname, "vm", 2, 0, 0, 0), "hostname");
    for (int i = 0; i < o.limits; i++) {
        struct rlimit limit = {o.limit[i].value, o.limit[i].value};
        must(sys(SYS_setrlimit, o.limit[i].resource, &limit, 0, 0, 0), "limit");
    }
    i64 null = sys(SYS_openat, AT_FDCWD, "/dev/null", 0, 0, 0);
    must(null, "stdin");
    must(sys(SYS_dup3, null, 0, 0, 0, 0), "stdin");
    must(sys(SYS_dup3, said, 1, 0, 0, 0), "stdout");
    must(sys(SYS_dup3, said, 2, 0, 0, 0), "stderr");
    must(sys(SYS_close_range, 3, ~0u, CLOSE_RANGE_CLOEXEC, 0, 0), "close");
    for (int i = 0; i < o.keep.count; i++)
        must(sys(SYS_fcntl, o.keep.fd[i], F_SETFD, 0, 0, 0), "keep");
    limit_capabilities();
    if (!(o.ns & CLONE_NEWUSER))
        become_user();
    drop_capabilities();
    for (; *environment && o.variables < MANY - 1; environment++)
        o.variable[o.variables++] = *environment;
    if (o.until >= 0) /* only now: a change of user forgets it */
        must(sys(SYS_prctl, PR_SET_PDEATHSIG, 9, 0, 0, 0), "end");
    if (o.shares.count)
        filter_files();
    if (o.seccomp)
        filter_vmm();
    must(sys(SYS_execve, o.program[0], o.program, o.variable, 0, 0), "exec");
}

/* --- the copier -------------------------------------------------------------------------------------------------- */

#define CLIENTS 8
#define BUFFER 65536

static u8 buffer[BUFFER];
static int client[CLIENTS];
static u64 total;         /* bytes that the console has printed */
static u64 in_log;        /* of these in console.log */
static u64 last_index;
static u64 events_left = 4 << 20, said_left = 1 << 20;
/* keys that the guest has yet to take */
static u8 keys[4096];
static u64 keys_used;

static void write_all(int fd, const u8 *data, u64 count)
{
    while (count) {
        i64 done = sys(SYS_write, fd, data, count, 0, 0);
        if (done == -EINTR)
            continue;
        if (done <= 0)
            return; /* a full disk: the VM goes on all the same */
        data += done, count -= (u64)done;
    }
}

static void empty(int fd)
{
    sys(SYS_ftruncate, fd, 0, 0, 0, 0);
    sys(SYS_lseek, fd, 0, SEEK_SET, 0, 0);
}

static void move(int from, int to)
{
    empty(to);
    sys(SYS_lseek, from, 0, SEEK_SET, 0, 0);
    while (sys(SYS_sendfile, to, from, 0, 1 << 20, 0) > 0)
        ;
    empty(from);
}

static u64 now(void)
{
    struct timespec t = {0, 0};
    sys(SYS_clock_gettime, 0, &t, 0, 0, 0);
    return (u64)t.sec * 1000000000 + (u64)t.nsec;
}

static void log_console(const u8 *data, u64 count)
{
    if (in_log >= o.log_max) {
        move(o.log, o.old);
        move(o.index, o.old_index);
        in_log = last_index = 0;
    }
    /* an entry says when the byte of its number came; more than one in a millisecond tells nobody anything */
    u64 entry[2] = {total, now()};
    if (in_log == 0 || entry[1] - last_index >= 1000000) {
        write_all(o.index, (const u8 *)entry, sizeof entry);
        last_index = entry[1];
    }
    write_all(o.log, data, count);
    in_log += count;
    total += count;
}

static i64 first_of(int index, u64 *number)
{
    return sys(SYS_read, index, number, sizeof *number, 0, 0) == sizeof *number;
}

/* The log of an instance that is started again goes on where it was: bytes keep their numbers. */
static void go_on(void)
{
    u64 first = 0;
    i64 size = sys(SYS_lseek, o.log, 0, SEEK_END, 0, 0);
    if (size > 0 && first_of(o.index, &first)) {
        in_log = (u64)size, total = first + in_log;
        /* an entry of which a full disk took a part is written over */
        sys(SYS_lseek, o.index, sys(SYS_lseek, o.index, 0, SEEK_END, 0, 0) & ~15L, SEEK_SET, 0, 0);
        return;
    }
    /* nothing but what has moved, or was just moving when all of us were killed */
    if (size == 0 && (first_of(o.index, &first) || first_of(o.old_index, &first)))
        total = first + (u64)sys(SYS_lseek, o.old, 0, SEEK_END, 0, 0);
    empty(o.log);
    empty(o.index);
}

static void lose(int i)
{
    sys(SYS_close, client[i], 0, 0, 0, 0);
    client[i] = -1;
}

static void flush_keys(void)
{
    if (!keys_used || o.console < 0)
        return;
    i64 done = sys6(SYS_sendto, o.console, (i64)keys, (i64)keys_used, MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0);
    if (done <= 0)
        return;
    keys_used -= (u64)done;
    for (u64 i = 0; i < keys_used; i++)
        keys[i] = keys[i + (u64)done];
}

static void from_console(void)
{
    i64 count = sys(SYS_read, o.console, buffer, BUFFER, 0, 0);
    if (count == -EINTR || count == -EAGAIN)
        return;
    if (count <= 0) {
        sys(SYS_close, o.console, 0, 0, 0, 0);
        o.console = -1;
        return;
    }
    log_console(buffer, (u64)count);
    /* The log is what is read; the socket wakes who waits for it. So what a slow client does not take is no loss. */
    for (int i = 0; i < CLIENTS; i++)
        if (client[i] >= 0) {
            i64 sent = sys6(SYS_sendto, client[i], (i64)buffer, count, MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0);
            if (sent < 0 && sent != -EAGAIN)
                lose(i);
        }
}

static void from_client(int i)
{
    i64 count = sys(SYS_read, client[i], keys + keys_used, sizeof keys - keys_used, 0, 0);
    if (count <= 0 && count != -EAGAIN && count != -EINTR)
        lose(i);
    if (count > 0)
        keys_used += (u64)count;
}

static void welcome(void)
{
    i64 fd = sys(SYS_accept4, o.listen, 0, 0, O_CLOEXEC | O_NONBLOCK, 0);
    if (fd < 0)
        return;
    for (int i = 0; i < CLIENTS; i++)
        if (client[i] < 0) {
            client[i] = (int)fd;
            return;
        }
    sys(SYS_close, fd, 0, 0, 0, 0);
}

/* Into a file of bounded size; what comes then is read and thrown away, so that the VMM never waits for us. */
static void into(int *from, int to, u64 *left)
{
    i64 count = sys(SYS_read, *from, buffer, BUFFER, 0, 0);
    if (count == -EINTR || count == -EAGAIN)
        return;
    if (count <= 0) {
        sys(SYS_close, *from, 0, 0, 0, 0);
        *from = -1;
        return;
    }
    u64 take = (u64)count < *left ? (u64)count : *left;
    *left -= take;
    write_all(to, buffer, take);
}

static void filter_copier(void)
{
    static const u16 needed[] = {
        SYS_read, SYS_write, SYS_close, SYS_poll, SYS_lseek, SYS_sendfile, SYS_ftruncate, SYS_clock_gettime,
        SYS_exit_group, SYS_accept4, SYS_sendto,
    };
    enum { N = sizeof needed / sizeof *needed };
    struct filter filters[N * 2 + 8];
    u64 n = 0;
    PUT(LOAD(4));
    PUT(JEQ(X86_64, 1, 0));
    PUT(RET(KILL));
    PUT(LOAD(0));
    for (int i = 0; i < N; i++) {
        PUT(JEQ(needed[i], 0, 1));
        PUT(RET(ALLOW));
    }
    PUT(RET(KILL));
    install(filters, n);
}

static void copy(int said)
{
    static const char negotiate[] = "{\"execute\": \"qmp_capabilities\"}\n";
    for (int i = 0; i < CLIENTS; i++)
        client[i] = -1;
    must(sys(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0), "copier");
    limit_capabilities();
    drop_capabilities();
    filter_copier();
    go_on();
    if (o.events >= 0)
        write_all(o.events, (const u8 *)negotiate, sizeof negotiate - 1);
    while (o.console >= 0 || o.events >= 0 || said >= 0) {
        struct pollfd wait[4 + CLIENTS];
        memset(wait, 0, sizeof wait);
        wait[0] = (struct pollfd){o.console, (short)(POLLIN | (keys_used ? POLLOUT : 0)), 0};
        wait[1] = (struct pollfd){o.events, POLLIN, 0};
        wait[2] = (struct pollfd){said, POLLIN, 0};
        wait[3] = (struct pollfd){o.console >= 0 ? o.listen : -1, POLLIN, 0};
        for (int i = 0; i < CLIENTS; i++)
            /* a guest that takes no keys must not make us collect them without end */
            wait[4 + i] = (struct pollfd){client[i], (short)(keys_used < sizeof keys ? POLLIN : 0), 0};
        if (sys(SYS_poll, wait, 4 + CLIENTS, -1, 0, 0) < 0)
            continue;
        if (wait[0].revents & POLLOUT)
            flush_keys();
        if (wait[0].revents & (POLLIN | POLLHUP | POLLERR))
            from_console();
        if (wait[1].revents)
            into(&o.events, o.event_log, &events_left);
        if (wait[2].revents)
            into(&said, o.said, &said_left);
        for (int i = 0; i < CLIENTS; i++)
            if (wait[4 + i].revents && client[i] == wait[4 + i].fd && client[i] >= 0)
                from_client(i);
        /* after those who have gone have made room */
        if (wait[3].revents & POLLIN)
            welcome();
        flush_keys();
    }
    sys(SYS_exit_group, 0, 0, 0, 0, 0);
}

/* --- the watcher ------------------------------------------------------------------------------------------------- */

static i64 write_file(int dir, const char *name, const char *content, u64 count, int flags)
{
    i64 fd = sys(SYS_openat, dir, name, O_WRONLY | O_CLOEXEC | flags, 0600, 0);
    if (fd < 0)
        return fd;
    i64 done = sys(SYS_write, fd, content, count, 0, 0);
    sys(SYS_close, fd, 0, 0, 0, 0);
    return done;
}

/* A file of the instance's directory, whole or not at all. */
static void note(const char *temporary, const char *name, struct text *content)
{
    if (write_file(o.dir, temporary, content->bytes, content->used, O_CREAT | O_TRUNC | O_NOFOLLOW)
        == (i64)content->used)
        sys(SYS_renameat, o.dir, temporary, o.dir, name, 0);
}

static i64 write_proc(i64 pid, const char *name, struct text *content)
{
    struct text path = {.used = 0};
    add(&path, "/proc/");
    add_number(&path, (u64)pid);
    add(&path, "/");
    add(&path, name);
    i64 done = write_file(AT_FDCWD, path.bytes, content->bytes, content->used, 0);
    return done < 0 ? done : 0;
}

static i64 write_map(i64 pid, const char *name, u64 inside, u64 outside)
{
    struct text line = {.used = 0};
    add_number(&line, inside);
    add(&line, " ");
    add_number(&line, outside);
    add(&line, " 1");
    return write_proc(pid, name, &line);
}

static i64 map_user(i64 pid)
{
    i64 result = write_map(pid, "uid_map", INSIDE, o.uid);
    if (result < 0)
        return result;
    result = write_map(pid, "gid_map", INSIDE, o.gid);
    if (result == -EPERM) { /* a user without privileges has to give up setgroups first */
        struct text deny = {.used = 0};
        add(&deny, "deny");
        result = write_proc(pid, "setgroups", &deny);
        return result < 0 ? result : write_map(pid, "gid_map", INSIDE, o.gid);
    }
    return result;
}

/* A user namespace in which the one user and the one group of the disk are those of the VMM, and nobody else is anybody. */
static i64 disk_users(u64 uid, u64 gid, u64 vmm_uid, u64 vmm_gid)
{
    int hold[2];
    must(sys(SYS_pipe2, hold, O_CLOEXEC, 0, 0, 0), "pipe");
    i64 pid = sys(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
    if (pid < 0)
        return pid;
    if (pid == 0) { /* it is there as long as we look, and no longer than we are */
        sys(SYS_close, hold[1], 0, 0, 0, 0);
        sys(SYS_read, hold[0], &hold[1], 1, 0, 0);
        sys(SYS_exit_group, 0, 0, 0, 0, 0);
    }
    i64 result = write_map(pid, "uid_map", uid, vmm_uid);
    if (result >= 0)
        result = write_map(pid, "gid_map", gid, vmm_gid);
    if (result >= 0) {
        struct text path = {.used = 0};
        add(&path, "/proc/");
        add_number(&path, (u64)pid);
        add(&path, "/ns/user");
        result = sys(SYS_openat, AT_FDCWD, path.bytes, O_CLOEXEC, 0, 0);
    }
    sys(SYS_close, hold[0], 0, 0, 0, 0);
    sys(SYS_close, hold[1], 0, 0, 0, 0);
    while (sys(SYS_wait4, pid, 0, 0, 0, 0) == -EINTR)
        ;
    return result;
}

/* Only root can make a mount that has other owners than the disk; so it is made here, and put into its place by the VMM's side. */
static void prepare_share(int i)
{
    int fd;
    share_of(i, &fd);
    o.share[i] = -1;
    /* a user's VMM is that user; so is that of a container's root, who can become nobody else and has no right to such a mount */
    if (sys(SYS_geteuid, 0, 0, 0, 0, 0) != 0 || (o.has_user && o.uid == 0))
        return;
    u32 info[36];
    must(sys(SYS_fstat, fd, info, 0, 0, 0), "share");
    i64 tree = tree_of(fd);
    u64 uid = info[7], gid = info[8]; /* st_uid, st_gid */
    u64 vmm_uid = o.has_user ? o.uid : 0, vmm_gid = o.has_user ? o.gid : (u64)sys(SYS_getegid, 0, 0, 0, 0, 0);
    /* also where both are the same: what belongs to others is nobody's then, and what is no file system of files is refused */
    i64 users = disk_users(uid, gid, vmm_uid, vmm_gid);
    must(users, "user-map");
    struct mount_attr attr = {.set = MOUNT_ATTR_IDMAP, .userns = (u64)users};
    must(sys(SYS_mount_setattr, tree, "", AT_EMPTY_PATH | AT_RECURSIVE, &attr, sizeof attr), "idmap");
    sys(SYS_close, users, 0, 0, 0, 0);
    o.share[i] = tree;
}

static i64 locked;
static u64 locked_size;

/* Locks the pages that a file has. Its holes stay holes: whoever reads one fills it, so only what is data is touched. */
static void lock_pages(int fd)
{
    u64 info[18];
    must(sys(SYS_fstat, fd, info, 0, 0, 0), "lock");
    locked_size = info[6]; /* st_size */
    struct rlimit limit;
    must(sys(SYS_getrlimit, RLIMIT_MEMLOCK, &limit, 0, 0, 0), "lock");
    limit.soft = limit.hard;
    must(sys(SYS_setrlimit, RLIMIT_MEMLOCK, &limit, 0, 0, 0), "lock");
    /* private, and never written to: those are the file's own pages, and a sealed file is not mapped shared before 6.7 */
    locked = sys6(SYS_mmap, 0, (i64)locked_size, PROT_READ, MAP_PRIVATE, fd, 0);
    must(locked > -4096 && locked < 0 ? locked : 0, "lock");
    must(sys(SYS_mlock2, locked, locked_size, MLOCK_ONFAULT, 0, 0), "lock");
    i64 start, end = 0;
    while ((start = sys(SYS_lseek, fd, end, SEEK_DATA, 0, 0)) >= 0
           && (end = sys(SYS_lseek, fd, start, SEEK_HOLE, 0, 0)) > start)
        for (i64 at = start; at < end; at += 4096)
            (void)*(volatile u8 *)(locked + at);
}

/* Returns when the VMM has ended, or is about to because another process has. */
static void end_with_other(i64 vmm)
{
    struct pollfd wait[2] = {{(int)sys(SYS_pidfd_open, vmm, 0, 0, 0, 0), POLLIN, 0}, {o.until, POLLIN, 0}};
    while (sys(SYS_poll, wait, 2, -1, 0, 0) < 0)
        ;
    if (!wait[0].revents)
        sys(SYS_kill, vmm, 9, 0, 0, 0); /* not reaped yet, so the number is its own */
    if (wait[0].fd >= 0)
        sys(SYS_close, wait[0].fd, 0, 0, 0, 0);
}

static void watch(char **environment)
{
    int go[2], said[2];
    must(sys(SYS_pipe2, go, O_CLOEXEC, 0, 0, 0), "pipe");
    must(sys(SYS_pipe2, said, O_CLOEXEC, 0, 0, 0), "pipe");
    i64 answer_to = sys(SYS_fcntl, 1, 1030 /* F_DUPFD_CLOEXEC */, 3, 0, 0);
    must(answer_to, "pipe");
    if (o.lock >= 0)
        lock_pages(o.lock);
    for (int i = 0; i < o.shares.count; i++)
        prepare_share(i);
    must(sys(SYS_pipe2, status_pipe, O_CLOEXEC, 0, 0, 0), "pipe");

    i64 vmm = sys(SYS_clone, o.ns | SIGCHLD, 0, 0, 0, 0);
    if (vmm < 0) {
        status_pipe[1] = (int)answer_to;
        fail("namespaces", vmm);
    }
    if (vmm == 0) {
        sys(SYS_close, go[1], 0, 0, 0, 0);
        run_program(go[0], said[1], environment);
    }
    /* from here on the VMM exists, and ends when we do before it was told to go */
    const char *stage = 0;
    i64 result = 0;
    if (o.ns & CLONE_NEWUSER)
        stage = "user-map", result = map_user(vmm);
    for (int i = 0; i < o.cgroups.count && result >= 0; i++) {
        struct text line = {.used = 0};
        add_number(&line, (u64)vmm);
        stage = "cgroup", result = sys(SYS_write, o.cgroups.fd[i], line.bytes, line.used, 0, 0);
    }
    struct text answer = {.used = 0};
    if (result >= 0) {
        /* noted before it runs: should we be killed in between, it is found */
        add_number(&answer, (u64)vmm);
        add(&answer, " ");
        add_number(&answer, (u64)sys(SYS_getpid, 0, 0, 0, 0, 0));
        add(&answer, "\n");
        note("vmm.pid.tmp", "vmm.pid", &answer);
        sys(SYS_write, go[1], "!", 1, 0, 0);
        sys(SYS_close, status_pipe[1], 0, 0, 0, 0);
        struct text error = {.used = 0};
        i64 got;
        while ((got = sys(SYS_read, status_pipe[0], error.bytes + error.used, sizeof error.bytes - error.used, 0, 0)) > 0
               || got == -EINTR)
            error.used += got > 0 ? (u64)got : 0;
        if (error.used) {
            sys(SYS_wait4, vmm, 0, 0, 0, 0);
            sys(SYS_unlinkat, o.dir, "vmm.pid", 0, 0, 0);
            sys(SYS_write, answer_to, error.bytes, error.used, 0, 0);
            sys(SYS_exit_group, 1, 0, 0, 0, 0);
        }
    } else {
        sys(SYS_kill, vmm, 9, 0, 0, 0);
        sys(SYS_wait4, vmm, 0, 0, 0, 0);
        status_pipe[1] = (int)answer_to;
        fail(stage, result);
    }

    /* What was the VMM's is closed before anybody hears that it runs: locks on it must not outlive it in us. */
    int kept[MANY + 16] = {o.dir, o.console, o.listen, o.events, o.log, o.old, o.index, o.old_index, o.said, o.event_log,
                           said[0], (int)answer_to, o.until};
    int count = 13;
    for (int i = 0; i < o.hold.count; i++)
        kept[count++] = o.hold.fd[i];
    close_all_but(kept, count);

    i64 copier = sys(SYS_fork, 0, 0, 0, 0, 0);
    if (copier == 0) {
        int own[] = {o.console, o.listen, o.events, o.log, o.old, o.index, o.old_index, o.said, o.event_log, said[0]};
        close_all_but(own, sizeof own / sizeof *own);
        if (o.lock >= 0) /* a fork locks nothing, but has it mapped */
            sys(SYS_munmap, locked, locked_size, 0, 0, 0);
        copy(said[0]);
    }
    struct text ok = {.used = 0};
    add(&ok, "ok ");
    add(&ok, answer.bytes);
    sys(SYS_write, answer_to, ok.bytes, ok.used, 0, 0);

    /* of what we inherited the directory stays, and what we are to hold or to wait for */
    count = 0;
    kept[count++] = o.dir;
    kept[count++] = o.until;
    for (int i = 0; i < o.hold.count; i++)
        kept[count++] = o.hold.fd[i];
    close_all_but(kept, count);

    if (o.until >= 0)
        end_with_other(vmm);
    int status = 0;
    struct rusage used;
    memset(&used, 0, sizeof used);
    while (sys(SYS_wait4, vmm, &status, 0, &used, 0) == -EINTR)
        ;
    u64 ended = now();
    if (copier > 0)
        while (sys(SYS_wait4, copier, 0, 0, 0, 0) == -EINTR) /* the last words are in the files before the end is told */
            ;
    struct text line = {.used = 0};
    add_number(&line, (u64)status);
    add(&line, " ");
    add_number(&line, ended);
    add(&line, " ");
    add_number(&line, (u64)used.user.sec * 1000000 + (u64)used.user.usec);
    add(&line, " ");
    add_number(&line, (u64)used.system.sec * 1000000 + (u64)used.system.usec);
    add(&line, " ");
    add_number(&line, (u64)used.maxrss * 1024);
    add(&line, "\n");
    note("exit.tmp", "exit", &line);
    if (o.at_end_count) {
        i64 null = sys(SYS_openat, AT_FDCWD, "/dev/null", 2, 0, 0);
        for (int fd = 0; fd < 3 && null >= 0; fd++)
            sys(SYS_dup3, null, fd, 0, 0, 0);
        on_signals(SIG_DFL);
        sys(SYS_execve, o.at_end[0], o.at_end, environment, 0, 0);
    }
    sys(SYS_exit_group, 0, 0, 0, 0, 0);
}

__attribute__((used)) void begin(i64 *stack)
{
    i64 count = stack[0];
    char **words = (char **)(stack + 1), **environment = words + count + 1;
    status_pipe[1] = 1;
    if (count < 2 || !parse(words + 1))
        fail("usage", -EINVAL);
    /* without these it would be the host's own root that is mounted over, and the host's processes that are shown */
    if (o.root && (o.ns & (CLONE_NEWNS | CLONE_NEWPID)) != (CLONE_NEWNS | CLONE_NEWPID))
        fail("root", -EINVAL);
    if (o.shares.count && !o.root)
        fail("share", -EINVAL);
    i64 child = sys(SYS_fork, 0, 0, 0, 0, 0);
    must(child, "fork");
    if (child)
        sys(SYS_exit_group, 0, 0, 0, 0, 0);
    sys(SYS_setsid, 0, 0, 0, 0, 0);
    /* who powers the host down ends the VMM, too, and we have to say how it ended */
    on_signals(SIG_IGN);
    watch(environment);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n");

#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST "unknown"
#endif
/* by this a stale binary is told from a fresh one */
__attribute__((used)) static const char source[] = "watch.c sha256:" SOURCE_DIGEST;

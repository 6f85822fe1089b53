/* Starts passt for one VM, and stands between the two: what a guest sends to the host's own loopback goes no further.
 *
 *     fence guest=FD user=UID:GID mac=AABBCCDDEEFF [resolv=PATH] [count=FD] -- PROGRAM ARGUMENT...
 *
 * passt takes the destination of a frame for that of a connection of the host's. A guest that is its own root can send
 * frames to 127.0.0.1, and passt (all versions up to 2024 at the least) then connects to services that listen there
 * because nobody but the host itself should reach them. So each frame of the guest is looked at before passt sees it:
 *
 *     ARP, RARP                                      pass
 *     IPv4 from or to 127.0.0.0/8, to 0.0.0.0/8      go no further (to connect to 0.0.0.0 is to connect to oneself)
 *     IPv6 from or to 0000::/16, but for :: as the   go no further (::1, and IPv4 addresses in disguise)
 *     source
 *     any other IPv4 and IPv6                        pass
 *     everything else                                goes no further
 *
 * What comes back from passt passes as it is, and one thing is added. When a client of a forwarded port waits for the guest
 * to speak first (as those of SMTP or MySQL do), passt of 2023-03 never sends the ACK that ends the handshake, and both wait
 * for ever. So each SYN-ACK of the guest's is answered here; where passt does it, too, that is a harmless repetition.
 *
 * PROGRAM has its end of the connection as descriptor 3. The first line on
 * stdout is its number. When the guest's side, ours or passt's ends, so do the other two.
 *
 *     guest=FD               a stream socket to the VMM: frames, each after its length in 32 bits, big-endian
 *     user=UID:GID           whom we become; PROGRAM has to see to that by itself
 *     mac=AABBCCDDEEFF       the guest's: passt is told of it before the guest says anything (it would not ask a restored one
 *                            that is silent)
 *     resolv=PATH            PROGRAM finds this file at /etc/resolv.conf, where the host lets us do that
 *     count=FD               a file of two 64-bit numbers: the bytes of frames that passed from the guest, and to it. They go on
 *                            from what is there, and are a second or two late at most
 *
 * Without a C library, as watch.c is; scripts/build-native.sh builds it.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long i64;

enum {
    SYS_read = 0, SYS_write = 1, SYS_poll = 7, SYS_rt_sigaction = 13, SYS_pread64 = 17, SYS_pwrite64 = 18,
    SYS_sendto = 44, SYS_recvfrom = 45, SYS_setrlimit = 160,
    SYS_socketpair = 53, SYS_fork = 57, SYS_execve = 59, SYS_wait4 = 61, SYS_fcntl = 72, SYS_setgroups = 116,
    SYS_setresuid = 117, SYS_setresgid = 119, SYS_capset = 126, SYS_prctl = 157, SYS_getuid = 102, SYS_getgid = 104, SYS_mount = 165, SYS_exit_group = 231,
    SYS_dup3 = 292, SYS_close_range = 436, SYS_close = 3, SYS_restart_syscall = 219, SYS_openat = 257,
    SYS_unshare = 272,
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
#define sys(n, a, b, c, d) sys6(n, (i64)(a), (i64)(b), (i64)(c), (i64)(d), 0, 0)

#define EINTR 4
#define EPERM 1
#define EAGAIN 11
#define POLLIN 1
#define POLLOUT 4
#define AF_UNIX 1
#define AT_FDCWD (-100)
#define O_WRONLY 01
#define O_CLOEXEC 02000000
#define CLONE_NEWNS 0x20000
#define CLONE_NEWUSER 0x10000000
#define MS_BIND 4096
#define MS_REC 16384
#define MS_PRIVATE (1 << 18)
#define SOCK_STREAM 1
#define SOCK_CLOEXEC 02000000
#define MSG_DONTWAIT 0x40
#define MSG_NOSIGNAL 0x4000
#define SIGPIPE 13
#define RLIMIT_FSIZE 1
#define PR_SET_DUMPABLE 4
#define PR_SET_SECCOMP 22
#define PR_SET_NO_NEW_PRIVS 38
#define PR_SET_THP_DISABLE 41

struct pollfd { int fd; short events, revents; };
struct filter { u16 code; u8 jt, jf; u32 k; };
struct program { u16 count; struct filter *filters; };

void *memset(void *to, int value, u64 count)
{
    u8 *p = to;
    while (count--)
        *p++ = (u8)value;
    return to;
}

void *memmove(void *to, const void *from, u64 count)
{
    /* towards the front alone; "rep movsb" is as quick as anything on processors that have ERMS */
    void *p = to;
    __asm__ volatile("rep movsb" : "+D"(p), "+S"(from), "+c"(count) : : "memory");
    return to;
}

void *memcpy(void *to, const void *from, u64 count)
{
    return memmove(to, from, count);
}

static _Noreturn void end(int code)
{
    for (;;)
        sys(SYS_exit_group, code, 0, 0, 0);
}

static void say(const char *words)
{
    u64 count = 0;
    while (words[count])
        count++;
    sys(SYS_write, 2, words, count, 0);
}

static void must(i64 result, const char *stage)
{
    if (result >= 0)
        return;
    say("fence: ");
    say(stage);
    say(" failed\n");
    end(1);
}

/* --- what passes ------------------------------------------------------------------------------------------------- */

#define ETHERNET 14
#define FRAME_MAX 65549 /* the largest IP packet, and its Ethernet header */

static int zero(const u8 *bytes, int count)
{
    while (count--)
        if (*bytes++)
            return 0;
    return 1;
}

static int passes(const u8 *frame, u64 size)
{
    if (size < ETHERNET)
        return 0;
    const u8 *packet = frame + ETHERNET;
    switch (frame[12] << 8 | frame[13]) {
    case 0x0806: /* ARP */
    case 0x8035: /* RARP: how a VMM announces its guest */
        return 1;
    case 0x0800:
        if (size < ETHERNET + 20)
            return 0;
        return packet[12] != 127 && packet[16] != 127 && packet[16] != 0;
    case 0x86dd:
        if (size < ETHERNET + 40)
            return 0;
        return (!zero(packet + 8, 2) || zero(packet + 8, 16)) && !zero(packet + 24, 2);
    default:
        return 0;
    }
}

/* --- both ways --------------------------------------------------------------------------------------------------- */

#define BUFFER (1 << 18)

/* Bytes on their way from one socket to another: those from start to ready may be sent, those up to used are a frame (or
 * its length) of which a part is still to come. */
struct way {
    int from, to;
    u64 start, ready, used;
    u8 bytes[BUFFER];
};

static struct way out, in;

/* Noted when so many milliseconds are quiet, or has been looked at so often: each note is a system call. */
#define QUIET 100
#define LOOKS 16

static int count_to = -1;
static u64 counted[2];
static int moved, looks;

static void note(void)
{
    moved = looks = 0;
    if (count_to >= 0) /* what a full disk does not take, it may take the next time */
        sys(SYS_pwrite64, count_to, counted, sizeof counted, 0);
}

/* Lets both sides know, and waits for passt's end, so that nobody else has to. */
static _Noreturn void finish(int code)
{
    note();
    sys(SYS_close, out.from, 0, 0, 0);
    sys(SYS_close, in.from, 0, 0, 0);
    while (sys(SYS_wait4, -1, 0, 0, 0) == -EINTR)
        ;
    end(code);
}

/* Moves what is left to the front, when less than the largest frame would find room behind it. */
static void make_room(struct way *way)
{
    if (way->start == way->used)
        way->start = way->ready = way->used = 0;
    if (way->start == 0 || BUFFER - way->used > FRAME_MAX + 4)
        return;
    memmove(way->bytes, way->bytes + way->start, way->used - way->start);
    way->used -= way->start, way->ready -= way->start, way->start = 0;
}

static int full(struct way *way)
{
    return way->used == BUFFER;
}

static void take(struct way *way)
{
    make_room(way);
    if (full(way))
        return;
    i64 count = sys6(SYS_recvfrom, way->from, (i64)(way->bytes + way->used), (i64)(BUFFER - way->used), MSG_DONTWAIT, 0, 0);
    if (count == -EAGAIN || count == -EINTR)
        return;
    if (count <= 0)
        finish(0);
    way->used += (u64)count;
}

static void give(struct way *way)
{
    if (way->start == way->ready)
        return;
    i64 count = sys6(SYS_sendto, way->to, (i64)(way->bytes + way->start), (i64)(way->ready - way->start),
                     MSG_DONTWAIT | MSG_NOSIGNAL, 0, 0);
    if (count == -EAGAIN || count == -EINTR)
        return;
    if (count < 0)
        finish(0);
    way->start += (u64)count;
}

static u32 sum_of(const u8 *bytes, int count)
{
    u32 sum = 0;
    for (int i = 0; i < count; i += 2)
        sum += (u32)(bytes[i] << 8 | bytes[i + 1]);
    return sum;
}

static void put_checksum(u8 *to, u32 sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    to[0] = (u8)(~sum >> 8), to[1] = (u8)~sum;
}

#define TCP 6
#define TCP_HEADER 20

/* Answers a SYN-ACK of the guest's, behind the frames from passt that have come whole. */
static void acknowledge(const u8 *frame, u64 size)
{
    const u8 *packet = frame + ETHERNET, *tcp;
    int ipv4 = frame[12] == 8 && frame[13] == 0, address = ipv4 ? 4 : 16, from = ipv4 ? 12 : 8, header = ipv4 ? 20 : 40;
    int given = ipv4 ? (packet[0] & 15) * 4 : 40;
    if (!ipv4 && frame[12] != 0x86)
        return;
    /* a fragment is no whole segment */
    if (given < header || packet[ipv4 ? 9 : 6] != TCP || (ipv4 && (packet[6] & 0x3f || packet[7])))
        return;
    tcp = packet + given;
    if (size < (u64)(ETHERNET + given + TCP_HEADER) || (tcp[13] & 0x17 /* FIN, SYN, RST, ACK */) != 0x12)
        return;
    u64 length = (u64)(ETHERNET + header + TCP_HEADER);
    if (BUFFER - in.used < 4 + length)
        return; /* it comes again */
    u8 *b = in.bytes + in.ready;
    for (u64 i = in.used; i > in.ready; i--) /* what has come of the next frame */
        in.bytes[i - 1 + 4 + length] = in.bytes[i - 1];
    in.ready += 4 + length, in.used += 4 + length;
    memset(b, 0, 4 + length);
    b[3] = (u8)length;
    b += 4;
    memcpy(b, frame + 6, 6);
    memcpy(b + 6, frame, 6);
    memcpy(b + 12, frame + 12, 2);
    b += ETHERNET;
    memcpy(b + from, packet + from + address, (u64)address);
    memcpy(b + from + address, packet + from, (u64)address);
    if (ipv4) {
        static const u8 head[] = {0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, TCP};
        memcpy(b, head, sizeof head);
        put_checksum(b + 10, sum_of(b, 20));
    } else {
        static const u8 head[] = {0x60, 0, 0, 0, 0, TCP_HEADER, TCP, 64};
        memcpy(b, head, sizeof head);
    }
    u8 *reply = b + header;
    memcpy(reply, tcp + 2, 2);
    memcpy(reply + 2, tcp, 2);
    memcpy(reply + 4, tcp + 8, 4);
    memcpy(reply + 8, tcp + 4, 4);
    for (int i = 11; i >= 8 && ++reply[i] == 0; i--)
        ;
    reply[12] = TCP_HEADER / 4 << 4;
    reply[13] = 0x10;
    reply[14] = 1; /* a window of 256, or of that times passt's scale */
    put_checksum(reply + 16, sum_of(b + from, 2 * address) + TCP + TCP_HEADER + sum_of(reply, TCP_HEADER));
}

static int always(const u8 *frame, u64 size)
{
    (void)frame, (void)size;
    return 1;
}

/* Looks at the frames that have come whole; one that may not pass is taken out. */
static void look(struct way *way, int (*may_pass)(const u8 *, u64))
{
    u64 at = way->ready;
    while (way->used - at >= 4) {
        const u8 *b = way->bytes + at;
        u64 size = (u64)b[0] << 24 | (u64)b[1] << 16 | (u64)b[2] << 8 | b[3];
        if (size > FRAME_MAX)
            finish(2); /* no network sends that: the VMM itself, or passt, is somebody else's by now */
        if (way->used - at < 4 + size)
            break;
        if (may_pass(b + 4, size)) {
            if (way == &out)
                acknowledge(b + 4, size);
            if (at != way->ready)
                memmove(way->bytes + way->ready, b, 4 + size);
            way->ready += 4 + size;
            counted[way == &in] += size;
            moved = 1;
        }
        at += 4 + size;
    }
    if (at != way->ready) { /* close the gap */
        memmove(way->bytes + way->ready, way->bytes + at, way->used - at);
        way->used -= at - way->ready;
    }
}

static void relay(void)
{
    for (;;) {
        make_room(&out);
        make_room(&in);
        struct pollfd wait[2] = {
            {out.from, (short)((full(&out) ? 0 : POLLIN) | (in.start != in.ready ? POLLOUT : 0)), 0},
            {in.from, (short)((full(&in) ? 0 : POLLIN) | (out.start != out.ready ? POLLOUT : 0)), 0},
        };
        i64 ready = sys(SYS_poll, wait, 2, moved ? QUIET : -1, 0);
        looks += moved;
        if (ready == 0 || looks == LOOKS)
            note();
        if (ready <= 0)
            continue;
        if (wait[0].revents & ~POLLOUT) {
            take(&out);
            look(&out, passes);
        }
        if (wait[1].revents & ~POLLOUT) {
            take(&in);
            look(&in, always);
        }
        give(&out);
        give(&in);
    }
}

/* --- the start --------------------------------------------------------------------------------------------------- */

static u64 number(const char **text)
{
    u64 n = 0;
    while (**text >= '0' && **text <= '9')
        n = n * 10 + (u64)(*(*text)++ - '0');
    return n;
}

static const char *value_of(const char *word, const char *name)
{
    while (*name && *word == *name)
        word++, name++;
    return *name == 0 && *word == '=' ? word + 1 : 0;
}

/* n in decimal digits, which end at *end*; the place where they begin. */
static char *digits_of(u64 n, char *end)
{
    do
        *--end = (char)('0' + n % 10);
    while (n /= 10);
    return end;
}

static void answer(u64 n)
{
    char line[24];
    line[23] = '\n';
    char *from = digits_of(n, line + 23);
    sys(SYS_write, 1, from, line + 24 - from, 0);
}

static void put(const char *path, const char *words, u64 count)
{
    i64 fd = sys(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd >= 0) {
        sys(SYS_write, fd, words, count, 0);
        sys(SYS_close, fd, 0, 0, 0);
    }
}

/* "N N 1": who it is here, it is there. */
static void map(const char *path, u64 n)
{
    char line[64], *end = line + sizeof line, *from = end;
    *--from = '1', *--from = ' ';
    from = digits_of(n, from);
    *--from = ' ';
    from = digits_of(n, from);
    put(path, from, (u64)(end - from));
}

/* In a mount namespace of our own. What fails is left out: names are then resolved as passt does it by itself. */
static void show(const char *path)
{
    u64 uid = (u64)sys(SYS_getuid, 0, 0, 0, 0), gid = (u64)sys(SYS_getgid, 0, 0, 0, 0);
    if (sys(SYS_unshare, CLONE_NEWNS | (uid ? CLONE_NEWUSER : 0), 0, 0, 0) < 0)
        return;
    if (uid) {
        put("/proc/self/setgroups", "deny", 4);
        map("/proc/self/uid_map", uid);
        map("/proc/self/gid_map", gid);
    }
    sys6(SYS_mount, 0, (i64) "/", 0, MS_REC | MS_PRIVATE, 0, 0);
    sys6(SYS_mount, (i64)path, (i64) "/etc/resolv.conf", 0, MS_BIND, 0, 0);
}

#define LOAD(offset) {0x20, 0, 0, offset}
#define JEQ(value, yes, no) {0x15, yes, no, value}
#define RET(value) {0x06, 0, 0, value}
#define ALLOW 0x7fff0000u
#define KILL 0x80000000u

static void confine(i64 uid, i64 gid)
{
    if (sys(SYS_getuid, 0, 0, 0, 0) == 0 && uid != 0) { /* who stays root has nobody to become: a container has no others */
        must(sys(SYS_setgroups, 0, 0, 0, 0), "setgroups");
        must(sys(SYS_setresgid, gid, gid, gid, 0), "setresgid");
        must(sys(SYS_setresuid, uid, uid, uid, 0), "setresuid");
    }
    u32 header[2] = {0x20080522, 0}, none[6] = {0};
    must(sys(SYS_capset, header, none, 0, 0), "capset");
    must(sys(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0), "prctl");
    must(sys(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0), "no-new-privs");
    u64 room[2] = {sizeof counted, sizeof counted}; /* all that we may write to any file */
    must(sys(SYS_setrlimit, RLIMIT_FSIZE, room, 0, 0), "setrlimit");
    static struct filter filters[] = {
        LOAD(4), JEQ(0xc000003eu, 1, 0), RET(KILL),
        LOAD(0),
        JEQ(SYS_poll, 8, 0), JEQ(SYS_recvfrom, 7, 0), JEQ(SYS_sendto, 6, 0), JEQ(SYS_close, 5, 0),
        JEQ(SYS_wait4, 4, 0), JEQ(SYS_pwrite64, 3, 0), JEQ(SYS_exit_group, 2, 0),
        JEQ(SYS_restart_syscall, 1, 0), /* a poll that was stopped, and goes on */
        RET(KILL),
        RET(ALLOW),
    };
    struct program program = {sizeof filters / sizeof *filters, filters};
    must(sys(SYS_prctl, PR_SET_SECCOMP, 2, &program, 0), "seccomp");
}

/* Puts a frame of the guest's on its way to passt; the place where what follows its Ethernet header begins. */
static u8 *frame_of(const u8 *mac, u16 kind, u64 size)
{
    u8 *b = out.bytes + out.used;
    memset(b, 0, 4 + ETHERNET + size);
    b[3] = (u8)(ETHERNET + size);
    memset(b + 4, 0xff, 6);
    memcpy(b + 10, mac, 6);
    b[16] = (u8)(kind >> 8), b[17] = (u8)kind;
    out.ready = out.used += 4 + ETHERNET + size;
    return b + 4 + ETHERNET;
}

static void announce(const char *digits)
{
    u8 mac[6];
    for (int i = 0; i < 6; i++) {
        mac[i] = 0;
        for (int j = 0; j < 2; j++, digits++)
            mac[i] = (u8)(mac[i] << 4 | (*digits <= '9' ? *digits - '0' : (*digits | 32) - 'a' + 10));
    }
    /* a RARP request, as VMMs send it for guests that have moved */
    u8 *rarp = frame_of(mac, 0x8035, 46);
    static const u8 request[] = {0, 1, 8, 0, 6, 4, 0, 3};
    memcpy(rarp, request, sizeof request);
    memcpy(rarp + 8, mac, 6);
    memcpy(rarp + 18, mac, 6);
    /* a router solicitation, from the link-local address that a guest has as a rule: passt has to know it, too */
    static const u8 head[] = {0x60, 0, 0, 0, 0, 8, 58, 255, 0xfe, 0x80}, routers[] = {0xff, 2};
    u8 *packet = frame_of(mac, 0x86dd, 48), *id = packet + 16;
    memcpy(packet, head, sizeof head);
    memcpy(id, mac, 3);
    memcpy(id + 5, mac + 3, 3);
    id[0] ^= 2, id[3] = 0xff, id[4] = 0xfe;
    memcpy(packet + 24, routers, sizeof routers);
    packet[39] = 2;
    packet[40] = 133;
    put_checksum(packet + 42, 8 + 58 + sum_of(packet + 8, 40));
}

__attribute__((used)) void begin(i64 *stack)
{
    char **words = (char **)(stack + 1) + 1, **environment = (char **)(stack + 1) + stack[0] + 1;
    int guest = -1;
    i64 uid = -1, gid = -1;
    const char *mac = 0, *resolv = 0, *v;
    for (; *words && !(words[0][0] == '-' && words[0][1] == '-' && !words[0][2]); words++) {
        if ((v = value_of(*words, "guest")))
            guest = (int)number(&v);
        else if ((v = value_of(*words, "user")))
            uid = (i64)number(&v), v++, gid = (i64)number(&v);
        else if ((v = value_of(*words, "mac")))
            mac = v;
        else if ((v = value_of(*words, "resolv")))
            resolv = v;
        else if ((v = value_of(*words, "count")))
            count_to = (int)number(&v);
    }
    u64 digits = 0;
    while (mac && mac[digits])
        digits++;
    if (guest < 0 || uid < 0 || digits != 12 || !*words || !words[1]) {
        say("fence: usage\n");
        end(1);
    }
    char **program = words + 1;
    int pair[2];
    must(sys(SYS_socketpair, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), "socketpair");
    i64 child = sys(SYS_fork, 0, 0, 0, 0);
    must(child, "fork");
    if (child == 0) {
        if (pair[1] == 3)
            must(sys(SYS_fcntl, 3, 2 /* F_SETFD */, 0, 0), "fcntl");
        else
            must(sys(SYS_dup3, pair[1], 3, 0, 0), "dup");
        must(sys(SYS_close_range, 4, ~0u, 0, 0), "close");
        if (resolv)
            show(resolv);
        /* its buffers are large, and mostly unused: with huge pages they would all be memory */
        sys(SYS_prctl, PR_SET_THP_DISABLE, 1, 0, 0);
        sys(SYS_execve, program[0], program, environment, 0);
        say("fence: the program cannot be executed\n");
        end(127);
    }
    answer((u64)child);
    /* passt is told apart from us by its stderr alone: ours is closed, and so an end of the pipe tells that of passt */
    for (int fd = 0; fd < 3; fd++)
        sys(SYS_close, fd, 0, 0, 0);
    sys(SYS_close, pair[1], 0, 0, 0);
    out.from = in.to = guest;
    in.from = out.to = pair[0];
    announce(mac);
    if (count_to >= 0)
        sys(SYS_pread64, count_to, counted, sizeof counted, 0);
    confine(uid, gid);
    relay();
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n");

#ifndef SOURCE_DIGEST
#define SOURCE_DIGEST "unknown"
#endif
/* by this a stale binary is told from a fresh one */
__attribute__((used)) static const char source[] = "fence.c sha256:" SOURCE_DIGEST;

/* A bare PVH guest with an agent, for tests: boots in some 50 ms under TCG. Its agent knows of qemu-guest-agent's protocol what
 * freezes file systems, of which it has none: it notes that it is told so, as the real one refuses to be frozen twice, and prints
 * FREEZE or THAW on the serial console, where it has said READY before. A newline there is answered by PONG and a count, a 'q'
 * powers it off, and after an 'm' its agent says nothing, until the next one; nothing else is obeyed. While it is frozen it adds to the
 * count no more: what stands still can be seen.
 *
 * The port is a virtio console's as of virtio 1.2, 5.3, with the legacy interface of 4.1.4.8: no memory needs to be mapped. It works
 * in 32 bits, without paging. What is sent is not waited for, as Linux does it: QEMU gives a buffer never back whose reader went away.
 *
 * gcc -m32 -O1 -ffreestanding -fno-pic -mgeneral-regs-only -c agent.c && ld -m elf_i386 -nostdlib -static -Ttext=0x200000 agent.o
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__asm__(
    ".section .note.pvh, \"a\", @note\n"
    "        .long   4, 4, 18\n" /* XEN_ELFNOTE_PHYS32_ENTRY */
    "        .asciz  \"Xen\"\n"
    "        .long   _start\n"
    ".text\n"
    ".globl _start\n"
    "_start: cli\n"
    "        mov     $stack + 16384, %esp\n"
    "        lgdt    gdtr\n"
    "        ljmp    $8, $1f\n"
    "1:      mov     $16, %eax\n"
    "        mov     %eax, %ds\n"
    "        mov     %eax, %es\n"
    "        mov     %eax, %ss\n"
    "        call    guest\n"
    "2:      cli\n"
    "        hlt\n"
    "        jmp     2b\n"
    "wake:   iret\n" /* the controller needs no word from us (AEOI) */
    ".data\n"
    ".balign 8\n"
    "gdt:    .quad   0, 0x00cf9b000000ffff, 0x00cf93000000ffff\n"
    "gdtr:   .word   23\n"
    "        .long   gdt\n"
    ".text\n");

extern char wake[];
u8 stack[16384] __attribute__((aligned(16)));
static u64 idt[0x30];

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory"); }
static inline u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }
static inline u16 inw(u16 port) { u16 value; __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }
static inline u32 inl(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory"); return value; }

enum { PM = 0x600, COM1 = 0x3f8 };

/* --- the console ------------------------------------------------------------------------------------------------ */

static void say(const char *text) {
    for (; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20)) { }
        outb(COM1, *text);
    }
}

static void say_number(const char *text, u32 number) {
    char digits[10];
    for (int i = 0; i < 8; i++)
        digits[i] = "0123456789abcdef"[number >> (28 - 4 * i) & 15];
    digits[8] = '\n';
    digits[9] = 0;
    say(text);
    say(digits);
}

/* --- the machine ------------------------------------------------------------------------------------------------ */

static void set_up(void) {
    static const u16 writes[][2] = { /* interrupt controllers at 0x20, the timer alone, at 1000 Hz; COM1 8n1 without interrupts */
        {0x20, 0x11}, {0x21, 0x20}, {0x21, 4}, {0x21, 3}, {0x21, 0xfe}, {0xa0, 0x11}, {0xa1, 0x28}, {0xa1, 2}, {0xa1, 1},
        {0xa1, 0xff}, {0x43, 0x34}, {0x40, 0xa9}, {0x40, 0x04}, {COM1 + 3, 3}, {COM1 + 4, 8},
    };
    struct { u16 limit; u32 base; } __attribute__((packed)) idtr = {sizeof(idt) - 1, (u32)idt};
    u32 at = (u32)wake;
    for (int i = 0x20; i < 0x30; i++)
        idt[i] = (u64)(at >> 16) << 48 | 0x8e00ull << 32 | 8 << 16 | (at & 0xffff);
    __asm__ volatile("lidt %0" : : "m"(idtr));
    for (u32 i = 0; i < sizeof(writes) / sizeof(*writes); i++)
        outb(writes[i][0], writes[i][1]);
    outw(PM + 2, 0x100); /* the power button */
}

static u32 pci(u32 slot, u32 offset) {
    outl(0xcf8, 0x80000000u | slot << 11 | offset);
    return inl(0xcfc);
}

/* --- the port --------------------------------------------------------------------------------------------------- */

enum { QUEUE_MAX = 256, RX_CONTROL = 2, TX_CONTROL = 3, RX = 4, TX = 5, QUEUES = 6 };
enum { DEVICE_READY = 0, PORT_READY = 3, PORT_OPEN = 6, MULTIPORT = 1 << 1 };

struct descriptor { u64 address; u32 size; u16 flags, next; };
struct control { u32 id; u16 event, value; };
struct queue {
    u16 size, sent;
    struct descriptor *descriptors;
    volatile u16 *available;
    volatile u16 *used;
};

static u8 rings[QUEUES][3 * 4096] __attribute__((aligned(4096)));
static u8 control_buffers[16][64], received[4096], sending[16][256];
static struct queue queues[QUEUES];
static u16 io;

static void open_queue(int number) {
    struct queue *queue = &queues[number];
    outw(io + 14, number);
    queue->size = inw(io + 12);
    if (queue->size == 0 || queue->size > QUEUE_MAX)
        return;
    u32 first = queue->size * 16 + 6 + 2 * queue->size;
    queue->descriptors = (void *)rings[number];
    queue->available = (void *)(rings[number] + queue->size * 16);
    queue->used = (void *)(rings[number] + ((first + 4095) & ~4095u));
    outl(io + 8, (u32)rings[number] >> 12);
}

static void give(int number, u16 index, void *buffer, u32 size, int writable) {
    struct queue *queue = &queues[number];
    queue->descriptors[index] = (struct descriptor){(u32)buffer, size, writable ? 2 : 0, 0};
    queue->available[2 + queue->sent % queue->size] = index;
    __asm__ volatile("" : : : "memory");
    queue->available[1] = ++queue->sent;
    outw(io + 16, number);
}

static int back(int number) { return queues[number].used[1] == queues[number].sent; }

static void send(int number, const void *data, u32 size) {
    u16 index = queues[number].sent % 16;
    for (u32 i = 0; i < size; i++)
        sending[index][i] = ((const u8 *)data)[i];
    give(number, index, sending[index], size, 0);
}

static void tell(u16 event) {
    struct control control = {1, event, 1};
    send(TX_CONTROL, &control, sizeof(control));
}

static int open_port(void) {
    u32 slot = 0;
    while (slot < 32 && pci(slot, 0) != 0x10031af4)
        slot++;
    if (slot == 32)
        return 0;
    io = pci(slot, 0x10) & 0xfffc;
    u32 command = pci(slot, 4);
    outl(0xcf8, 0x80000000u | slot << 11 | 4);
    outl(0xcfc, (command & 0xffff) | 5);
    outb(io + 18, 0);
    outb(io + 18, 3);
    outl(io + 4, MULTIPORT);
    for (int i = 0; i < QUEUES; i++)
        open_queue(i);
    outb(io + 18, 7);
    for (u16 i = 0; i < 16; i++) /* what the host tells of its side is of no use to us, and may be lost */
        give(RX_CONTROL, i, control_buffers[i], sizeof(control_buffers[i]), 1);
    tell(DEVICE_READY);
    tell(PORT_READY);
    give(RX, 0, received, sizeof(received), 1);
    tell(PORT_OPEN);
    return 1;
}

/* --- the agent -------------------------------------------------------------------------------------------------- */

static char line[4096];
static u32 length;
static int frozen, mute;

static const char *find(const char *text) {
    for (const char *at = line; *at; at++) {
        u32 same = 0;
        while (text[same] && at[same] == text[same])
            same++;
        if (!text[same])
            return at + same;
    }
    return 0;
}

static void answer(const char *text) {
    u32 size = 0;
    while (text[size])
        size++;
    send(TX, text, size);
}

static void obey(void) {
    const char *id;
    if (find("\"guest-sync-delimited\"") && (id = find("\"id\": "))) {
        char text[64] = "\xff{\"return\": ";
        u32 at = 12;
        while (*id >= '0' && *id <= '9' && at < 40)
            text[at++] = *id++;
        text[at++] = '}';
        text[at++] = '\n';
        text[at] = 0;
        answer(text);
    } else if (find("\"guest-fsfreeze-status\"")) {
        answer(frozen ? "{\"return\": \"frozen\"}\n" : "{\"return\": \"thawed\"}\n");
    } else if (find("\"guest-fsfreeze-thaw\"")) {
        if (frozen)
            say("THAW\n");
        answer(frozen ? "{\"return\": 1}\n" : "{\"return\": 0}\n");
        frozen = 0;
    } else if (find("\"guest-fsfreeze-freeze\"") && !frozen) {
        frozen = 1;
        say("FREEZE\n");
        answer("{\"return\": 1}\n");
    } else {
        answer("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"it is not for this agent\"}}\n");
    }
}

static void listen(void) {
    u32 size = *(volatile u32 *)(queues[RX].used + 2 + 4 * (u16)((queues[RX].sent - 1) % queues[RX].size) + 2);
    for (u32 i = 0; i < size && i < sizeof(received); i++) {
        u8 byte = received[i];
        if (byte == 0xff) {
            length = 0; /* what came before is half a command */
        } else if (byte == '\n') {
            line[length] = 0;
            if (length > 0 && !mute)
                obey();
            length = 0;
        } else if (length < sizeof(line) - 1) {
            line[length++] = byte;
        }
    }
    give(RX, 0, received, sizeof(received), 1);
}

static void power_off(void) {
    outw(PM + 4, 0x2000);
    outb(0x64, 0xfe);
}

void guest(void) {
    u32 count = 0;
    set_up();
    int there = open_port();
    say(there ? "READY\n" : "READY, and there is no port\n");
    for (;;) {
        if (inw(PM) & 0x100)
            power_off();
        if (there && back(RX))
            listen();
        if (inb(COM1 + 5) & 1) {
            u8 key = inb(COM1);
            if (key == '\n')
                say_number("PONG ", frozen ? count : ++count);
            else if (key == 'm')
                mute = !mute;
            else if (key == 'q')
                power_off();
        }
        __asm__ volatile("sti; hlt; cli" : : : "memory");
    }
}

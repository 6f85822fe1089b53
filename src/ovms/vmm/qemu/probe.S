# The guest that tells whether an accelerator really runs guests.
#
# Some hosts have a /dev/kvm that opens, and then runs ordinary code a thousand times slower than it should, or not at
# all. So this guest does what a kernel does when it starts, and says how far it came on the debug console: a loop
# before paging (A), long mode (B), a loop there (C), pages touched (D), CR3 written and CPUID asked (E). It ends
# through isa-debug-exit. A healthy processor needs about 10 ms for all of it.
#
# as --64 probe.S -o probe.o && ld -nostdlib -static -Ttext=0x200000 --build-id=none -z noexecstack -s probe.o -o probe.elf

.section .note.pvh, "a", @note
        .long   4, 4, 18                # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   start

.text
.code32
.globl _start
_start:
start:
        cli
        mov     $stack, %esp
        mov     $5000000, %ecx
1:      dec     %ecx
        jnz     1b
        mov     $0xe9, %dx
        mov     $'A', %al
        out     %al, %dx

        movl    $p3 + 7, p4             # the first GiB by pages of 2 MiB
        movl    $p2 + 7, p3
        mov     $p2, %edi
        mov     $0x87, %eax
        mov     $512, %ecx
1:      mov     %eax, (%edi)
        movl    $0, 4(%edi)
        add     $0x200000, %eax
        add     $8, %edi
        dec     %ecx
        jnz     1b
        mov     $p4, %eax
        mov     %eax, %cr3
        mov     $0x20, %eax
        mov     %eax, %cr4
        mov     $0xc0000080, %ecx       # EFER.LME
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     $0x80000001, %eax
        mov     %eax, %cr0
        lgdt    gdtr
        ljmp    $8, $long_mode

.code64
long_mode:
        mov     $0xe9, %dx
        mov     $'B', %al
        out     %al, %dx
        mov     $5000000, %ecx
1:      dec     %ecx
        jnz     1b
        mov     $'C', %al
        out     %al, %dx
        mov     $0x1000000, %rdi
        mov     $1024, %ecx
1:      incq    (%rdi)
        add     $4096, %rdi
        dec     %ecx
        jnz     1b
        mov     $'D', %al
        out     %al, %dx
        mov     $200, %esi
1:      mov     %cr3, %rax
        mov     %rax, %cr3
        xor     %eax, %eax
        cpuid
        dec     %esi
        jnz     1b
        mov     $0xe9, %dx
        mov     $'E', %al
        out     %al, %dx
        mov     $0x501, %dx
        xor     %eax, %eax
        out     %al, %dx
1:      hlt
        jmp     1b

.data
.balign 8
gdt:    .quad   0, 0x00af9b000000ffff
gdtr:   .word   15
        .long   gdt

.bss
.balign 4096
p4:     .skip   4096
p3:     .skip   4096
p2:     .skip   4096
        .skip   4096
stack:

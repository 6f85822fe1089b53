# A bare PVH guest for tests: boots in some 50 ms under TCG, and idles with hlt.
#
# Serial console (COM1): prints READY, then obeys single characters:
#   newline   counts in memory, touches 64 pages, prints "PONG <count, 8 hex digits>"
#   q         powers off
#   r         resets the machine (keyboard controller)
#   h         halts for ever with interrupts off
#   n         goes to the next ivshmem device on the bus, prints "REGION <its address>" (0 when there is no further one)
#   g         prints "GOT <the 32-bit number at 0 of the region>"
#   c         panics, as a guest with pvpanic says it
#   p         adds one to the 32-bit number at 4 of the region
# The ACPI power button powers it off, too; after an 'i' it is ignored.
#
# as --64 echo.S -o echo.o && ld -nostdlib -static -Ttext=0x200000 --build-id=none -z noexecstack echo.o -o echo.elf

.section .note.pvh, "a", @note
        .long   4, 4, 18                # XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   _start

.set PM, 0x600                          # where SeaBIOS puts the PIIX4's power management

.text
.code32
.globl _start
_start:
        cli
        mov     $stack, %esp
        movl    $p3 + 7, p4             # identity mapping, by pages of 2 MiB
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
        movl    $high + 7, p3 + 24      # and the last GiB below 4, where firmware places devices
        mov     $high, %edi
        mov     $0xc0000087, %eax
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
        mov     $0xc0000080, %ecx
        rdmsr
        or      $0x100, %eax
        wrmsr
        mov     $0x80000001, %eax
        mov     %eax, %cr0
        lgdt    gdtr
        ljmp    $8, $long_mode

.code64
long_mode:
        xor     %eax, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $stack, %rsp

        mov     $idt + 0x20 * 16, %rdi  # the timer and COM1 wake us; there is nothing else to do about them
        call    gate
        mov     $idt + 0x24 * 16, %rdi
        call    gate
        lidt    idtr

        lea     devices(%rip), %rsi
1:      lodsw                           # port, or 0 at the end
        test    %ax, %ax
        jz      2f
        mov     %ax, %dx
        lodsb
        out     %al, %dx
        jmp     1b
2:      mov     $PM + 2, %dx            # enable the power button
        mov     $0x100, %ax
        out     %ax, %dx
        movl    $1, obey_button

        lea     ready(%rip), %rsi
        call    puts

poll:   mov     $PM, %dx
        in      %dx, %ax
        test    $0x100, %ax
        jz      1f
        mov     $0x100, %ax             # acknowledge
        out     %ax, %dx
        cmpl    $0, obey_button
        jne     power_off
1:      cli
        mov     $0x3fd, %dx
        in      %dx, %al
        test    $1, %al
        jnz     2f
        sti
        hlt
        jmp     poll
2:      sti
        mov     $0x3f8, %dx
        in      %dx, %al
        cmp     $10, %al
        je      pong
        cmp     $'q', %al
        je      power_off
        cmp     $'r', %al
        je      reset
        cmp     $'h', %al
        je      halt
        cmp     $'n', %al
        je      next_region
        cmp     $'g', %al
        je      get
        cmp     $'p', %al
        je      put
        cmp     $'c', %al
        je      panic
        cmp     $'i', %al
        jne     poll
        movl    $0, obey_button
        jmp     poll

pong:   incl    count
        lea     heap(%rip), %rdi
        mov     $64, %ecx
1:      incq    (%rdi)
        add     $4096, %rdi
        dec     %ecx
        jnz     1b
        lea     text(%rip), %rsi
        mov     count, %ebx
        call    put_number
        jmp     poll

next_region:
        xor     %ebx, %ebx
1:      cmpl    $256, function          # every device's eight functions, on bus 0
        jae     2f
        mov     function, %ecx
        incl    function
        shl     $8, %ecx
        call    config
        cmp     $0x11101af4, %eax
        jne     1b
        mov     $0x18, %cl              # BAR 2
        call    config
        and     $0xfffffff0, %eax
        mov     %eax, %ebx
2:      mov     %ebx, region
        lea     region_text(%rip), %rsi
        call    put_number
        jmp     poll

config: mov     %ecx, %eax
        or      $0x80000000, %eax
        mov     $0xcf8, %dx
        out     %eax, %dx
        mov     $0xcfc, %dx
        in      %dx, %eax
        ret

get:    mov     region, %ebx
        mov     (%rbx), %ebx
        lea     got_text(%rip), %rsi
        call    put_number
        jmp     poll

put:    mov     region, %ebx
        incl    4(%rbx)
        jmp     poll

put_number:                             # the text at rsi, ebx, end of line
        call    puts
        mov     $8, %ecx
1:      rol     $4, %ebx
        mov     %ebx, %eax
        and     $15, %eax
        mov     digits(%rax), %al
        call    putc
        dec     %ecx
        jnz     1b
        mov     $10, %al
        jmp     putc

panic:  mov     $0x505, %dx
        mov     $1, %al
        out     %al, %dx
        jmp     halt

power_off:
        mov     $PM + 4, %dx
        mov     $0x2000, %ax
        out     %ax, %dx
reset:  mov     $0xfe, %al
        out     %al, $0x64
halt:   cli
        hlt
        jmp     halt

puts:   lodsb
        test    %al, %al
        jz      1f
        call    putc
        jmp     puts
1:      ret

putc:   mov     %al, %ah
1:      mov     $0x3fd, %dx
        in      %dx, %al
        test    $0x20, %al
        jz      1b
        mov     %ah, %al
        mov     $0x3f8, %dx
        out     %al, %dx
        ret

gate:   mov     $wake, %eax
        mov     %ax, (%rdi)
        movw    $8, 2(%rdi)
        movw    $0x8e00, 4(%rdi)
        shr     $16, %eax
        mov     %ax, 6(%rdi)
        ret

wake:   push    %rax
        mov     $0x20, %al              # end of interrupt
        out     %al, $0x20
        pop     %rax
        iretq

.data
ready:  .asciz  "READY\n"
text:   .asciz  "PONG "
region_text: .asciz "REGION "
got_text: .asciz "GOT "
digits: .ascii  "0123456789abcdef"
# interrupt controllers at vector 0x20 with timer and COM1 unmasked, timer at 100 Hz, COM1 8n1 with receive interrupts
devices:
        .word 0x20; .byte 0x11; .word 0x21; .byte 0x20; .word 0x21; .byte 4; .word 0x21; .byte 1; .word 0x21; .byte 0xee
        .word 0xa0; .byte 0x11; .word 0xa1; .byte 0x28; .word 0xa1; .byte 2; .word 0xa1; .byte 1; .word 0xa1; .byte 0xff
        .word 0x43; .byte 0x34; .word 0x40; .byte 0x9c; .word 0x40; .byte 0x2e
        .word 0x3fb; .byte 3; .word 0x3fc; .byte 8; .word 0x3f9; .byte 1
        .word 0
.balign 8
gdt:    .quad   0, 0x00af9b000000ffff
gdtr:   .word   15
        .long   gdt
        .long   0
idtr:   .word   0x30 * 16 - 1
        .quad   idt

.bss
count:  .skip 4
obey_button: .skip 4
function: .skip 4
region: .skip   4
.balign 4096
p4:     .skip   4096
p3:     .skip   4096
p2:     .skip   4096
high:   .skip   4096
idt:    .skip   4096
        .skip   4096
stack:
heap:   .skip   4096 * 64

"""Words that Linux shows for a processor's features in /proc/cpuinfo, so that a misspelt one is found.

As far as they are known here, in the spelling of Linux's cpufeatures.h (x86), cpuinfo.c (arm64) and setup.c (arm), which were not
at hand to check them against: a word that resembles none of them is no mistake. Of RISC-V the single letters.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

_X86 = """
    3dnow 3dnowext 3dnowprefetch abm acc_power ace ace2 ace2_en ace_en acpi adx aes amd_dcm amd_lbr_pmc_freeze amd_lbr_v2
    amx_avx512 amx_bf16 amx_complex amx_fp16 amx_fp8 amx_int8 amx_movrs amx_tf32 amx_tile aperfmperf apic arat
    arch_capabilities arch_lbr arch_perfmon art avic avx avx10 avx10_1 avx10_2 avx2 avx512_4fmaps avx512_4vnniw avx512_bf16
    avx512_bitalg avx512_fp16 avx512_vbmi avx512_vbmi2 avx512_vnni avx512_vp2intersect avx512_vpopcntdq avx512bw avx512cd
    avx512dq avx512er avx512f avx512ifma avx512pf avx512vbmi avx512vl avx_ifma avx_ne_convert avx_vnni avx_vnni_int16
    avx_vnni_int8 bhi_ctrl bmi1 bmi2 bpext bts bus_lock_detect cat_l2 cat_l3 cdp_l2 cdp_l3 centaur_mcr cid cldemote clflush
    clflushopt clwb clzero cmov cmp_legacy cmpccxadd constant_tsc core_capabilities cpb cpuid cpuid_fault cqm cqm_llc
    cqm_mbm_local cqm_mbm_total cqm_occup_llc cr8_legacy cx16 cx8 cxmmx cyrix_arr dca de debug_swap decodeassists ds_cpl
    dtes64 dtherm dts enqcmd epb ept ept_ad erms est extapic extd_apicid f16c fdp_excptn_only flexpriority flush_l1d
    flushbyasid fma fma4 fpu fred fsgsbase fsrc fsrm fsrs fxsr fxsr_opt fzrm gfni hfi hle ht hw_pstate hwp hwp_act_window
    hwp_epp hwp_notify hwp_pkg_req hybrid_cpu hypervisor ia64 ibpb ibrs ibrs_enhanced ibs ibt ida intel_pt intel_stibp invpcid
    invpcid_single irperf k6_mtrr la57 lahf_lm lam lbrv lkgs lm longrun lrti lwp mba mca mce md_clear misalignsse mmx mmxext
    monitor movbe movdir64b movdiri movrs mp mpx msr mtrr mwaitx nodeid_msr nonstop_tsc nonstop_tsc_s3 nopl npt nrip_save nx
    ospke osvw overflow_recov pae pat pausefilter pbe pcid pclmulqdq pconfig pdcm pdpe1gb pebs perfctr_core perfctr_llc
    perfctr_nb perfmon_v2 pfthreshold pge phe phe_en pku pln pmm pmm_en pn pni popcnt prefetchi proc_feedback pse pse36 pti
    pts ptsc rapl rdpid rdpru rdrand rdseed rdt_a rdtscp recovery rep_good ring3mwait rng rng_en rsb_ctxsw rtm
    rtm_always_abort sdbg sep serialize sev sev_es sev_snp sgx sgx_lc sha512 sha_ni shstk skinit sm3 sm4 smap smca sme
    sme_coherent smep smx spec_ctrl split_lock_detect srbds_ctrl ss ssbd sse sse2 sse4_1 sse4_2 sse4a ssse3 stibp succor svm
    svm_lock syscall tbm tce tm tm2 tme topoext tpr_shadow tsc tsc_adjust tsc_deadline_timer tsc_known_freq tsc_reliable
    tsc_scale tsxldtrk umip up user_shstk v_spec_ctrl v_vmsave_vmload vaes vgif vm_page_flush vmcb_clean vme vmmcall vmx vnmi
    vpclmulqdq vpid waitpkg wbnoinvd wdt wrmsrns x2apic x2avic xcompacted xfd xgetbv1 xop xsave xsavec xsaveerptr xsaveopt
    xsaves xtopology xtpr zero_fcs_fds
"""
_ARM64 = """
    aes afp asimd asimddp asimdfhm asimdhp asimdrdm atomics bf16 bti cpuid crc32 cssc dcpodp dcpop dgh dit ebf16 ecv evtstrm
    f8cvt f8dp2 f8dp4 f8e4m3 f8e5m2 f8fma faminmax fcma flagm flagm2 fp fphp fpmr frint gcs hbc i8mm ilrcpc jscvt lrcpc lrcpc3
    lse128 lut mops mte mte3 paca pacg pmull poe rng rpres rprfm sb sha1 sha2 sha3 sha512 sm3 sm4 sme sme2 sme2p1 smeb16b16
    smeb16f32 smebi32i32 smef16f16 smef16f32 smef32f32 smef64f64 smef8f16 smef8f32 smefa64 smei16i32 smei16i64 smei8i32
    smelutv2 smesf8dp2 smesf8dp4 smesf8fma ssbs sve sve2 sve2p1 sveaes sveb16b16 svebf16 svebitperm sveebf16 svef32mm svef64mm
    svei8mm svepmull svesha3 svesm4 uscat wfxt
"""
_ARM = """
    26bit aes asimdbf16 asimddp asimdfhm asimdhp crc32 crunch edsp evtstrm fastmult fpa fphp half i8mm idiva idivt iwmmxt java
    lpae neon pmull sb sha1 sha2 ssbs swp thumb thumbee tls vfp vfpd32 vfpv3 vfpv3d16 vfpv4
"""
WORDS: Mapping[str, Set[str]] = {
    "x86_64": frozenset(_X86.split()), "aarch64": frozenset(_ARM64.split()), "arm": frozenset(_ARM.split()),
    "riscv": frozenset("imafdcvbh"),
}  # fmt: skip

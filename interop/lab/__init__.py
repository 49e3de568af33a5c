"""The interop lab: real peers, real kernels, in machines that live for a minute.

```text
  interop/run ──▶ runner.py      which scenarios, how many at a time, the table at the end
                    │
                    ▼
  scenarios/NAME/scenario.py     a story an operator understands: hosts, what happens, what must hold
                    │ is handed a
                    ▼
                 world.py        hosts as network namespaces, links between them, netem, NAT
                    │            ├─ esplane.py     the daemon under test, on a host
                    │            ├─ linux.py       the kernel's ESP as a peer, keyed by `ip xfrm`
                    │            ├─ strongswan.py  charon on a host; libreswan.py: pluto
                    │            ├─ wire.py        captures, replays, tshark with the keys
                    │            └─ two sites, ready made: keyed_by_hand.py, behind.py (strongSwan)
                    ▼
                 place.py        where hosts live: a guest under QEMU, or namespaces of this machine
                    │ talks to
                    ▼
  guest/agent.py                 runs commands, starts daemons, sends traffic (guest/traffic.py)

  packages.py                    Debian packages as files, below target/interop/: nothing is installed
  image.py                       from them an initramfs: kernel modules, programs, Python, the agent
```

Only the kernel of a guest has ESP, netem and what else a test machine may lack; so all hosts of a
scenario normally live in one guest, as namespaces. A guest serves one scenario after the other
and is thrown away when one fails.
"""

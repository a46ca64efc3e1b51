"""How much of the cards of this machine is free.

A process of its own asks them: whoever asks a card holds some hundred MiB of it until he ends, and
`zppo compare` outlives the runs that it has checked.
"""

from __future__ import annotations

import json
import subprocess
import sys

from zppo.errors import LONGEST_SAID, UserError

ASK = (
    "import json, torch; cards = range(torch.cuda.device_count()); "
    "print(json.dumps([torch.cuda.mem_get_info(one)[0] for one in cards]))"
)


def free_of_cards() -> list[int]:
    """Free bytes of each card that torch can use. Raises UserError if their driver does not
    answer."""
    asked = subprocess.run(
        [sys.executable, "-P", "-c", ASK], capture_output=True, text=True, check=False
    )
    if asked.returncode:
        reason = (asked.stderr.strip() or f"exit code {asked.returncode}").splitlines()[-1]
        raise UserError(
            f"torch cannot use the GPUs of this machine ({reason[:LONGEST_SAID]}); expected cards "
            "that are free to use and a driver that suits this torch (nvidia-smi shows both)"
        )
    free: list[int] = json.loads(asked.stdout.splitlines()[-1])
    return free

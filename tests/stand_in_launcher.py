"""Stands in for DeepSpeed's two launchers, without their seconds of imports: `... FLAGS --module MODULE ARGUMENTS`.

Like them the outer one passes on no status of an inner one that a signal has ended; the inner one ends the other ranks
of one that fails, and its own when it is terminated.
"""

import os
import signal
import subprocess
import sys
import time


def outer(words):
    status = subprocess.run([sys.executable, __file__, "inner", *words]).returncode
    return max(status, 0)


def inner(words):
    count = int(words[words.index("--num_gpus") + 1])
    command = [sys.executable, "-m", *words[words.index("--module") + 1 :]]
    job = os.environ | {"WORLD_SIZE": str(count), "LOCAL_SIZE": str(count), "CROSS_RANK": "0"}
    job["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(count)))
    job["MASTER_PORT"] = words[words.index("--master_port") + 1]
    names = ("RANK", "LOCAL_RANK")
    ranks = [subprocess.Popen(command, env=job | dict.fromkeys(names, str(rank))) for rank in range(count)]

    def end(*_):
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()
        sys.exit(1)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    while any(statuses := [rank.poll() for rank in ranks]) or None in statuses:
        failed = next((status for status in statuses if status), None)
        if failed is not None:
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.wait()
            sys.exit(failed)
        time.sleep(1)
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit(inner(words[1:]) if words[0] == "inner" else outer(words))

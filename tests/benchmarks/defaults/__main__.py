"""``python -m tests.benchmarks.defaults``."""

import sys

from tests.benchmarks.defaults import QUESTION

if __name__ == "__main__":
    if "--check" in sys.argv:
        from tests.benchmarks.defaults import check

        check.main([name for name in sys.argv[1:] if name != "--check"])
    else:
        QUESTION.main()

"""LiberTEM on the same raw file: ``python libertem_peer.py FILE NY NX KY KX``; imports nothing of this package.

Prints one line of JSON: the version, and GB per processor second of its analyses, one core, warm.
"""

import json
import sys
import time


def main(path: str, *shape: int) -> dict[str, object]:
    """Return the version of LiberTEM and the rate of each analysis."""
    import libertem
    from libertem.api import Context
    from libertem.udf.com import CoMUDF
    from libertem.udf.sum import SumUDF
    from libertem.udf.sumsigudf import SumSigUDF

    context = Context.make_with("inline")
    data = context.load("raw", path=path, dtype="uint16", nav_shape=shape[:2], sig_shape=shape[2:])
    size = 2e-9 * shape[0] * shape[1] * shape[2] * shape[3]
    work = {
        "mean pattern": [SumUDF()],
        "one virtual image": [SumSigUDF()],
        "centre of mass": [CoMUDF.with_params()],
        "all three in one pass": [SumUDF(), SumSigUDF(), CoMUDF.with_params()],
    }
    rates = {}
    for name, udf in work.items():
        context.run_udf(dataset=data, udf=udf)  # compiled code, page cache
        costs = []
        for _ in range(3):
            began = time.process_time()
            context.run_udf(dataset=data, udf=udf)
            costs.append(time.process_time() - began)
        rates[name] = size / min(costs)
    return {"version": libertem.__version__, "rates": rates}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))

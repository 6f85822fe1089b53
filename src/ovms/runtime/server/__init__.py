"""``ovm serve``: the runtime contract over HTTP. It keeps no truth of its own: everything is in the instances' directories.

What is quick runs in threads of its own, so that neither a pull nor a stop lets a question wait. asyncio carries the connections
alone; everything behind them is as synchronous as it is for the command line. Why so: ADR 0015.
"""

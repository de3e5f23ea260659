"""The curate stage over chunk files: rows are read, changed, decided on and written a chunk at a time.

    read    a driver reads rows of the sources, workers make records of them
    steps   exact duplicates and ids are decided, workers apply that, and the map operations up to the next
            corpus operation, whose views they make; it decides over all views, and so on
    write   workers put rows on their sides, the driver joins their parts into the files of the data set

What a worker does with a chunk (``tasks.py``) is a function of files and of the rows that it is handed, so it
does not matter which process does it, nor when: the bytes written are the same for any number of workers and
after any interruption. The driver holds the rows of a few chunks on their way to the workers, and of all
others no more than a few tens of bytes each.
"""

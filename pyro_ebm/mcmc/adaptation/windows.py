"""When the mass matrix is renewed: Stan's windows, and earlier ones where gradients help."""

START_BUFFER, FIRST_WINDOW, END_BUFFER = 75, 25, 50
EARLIEST = 8  # the step at which the first window of positions and gradients begins
GROWTH = 1.5  # of a window's end over its start
LEAST = 20  # steps of a warmup in which a mass matrix is learned


def slow_windows(warmup_steps: int) -> list[tuple[int, int]]:
    """Stan's windows ``[start, end)``, for covariances, which need draws from the target.

    Example:
        >>> slow_windows(500)
        [(75, 100), (100, 150), (150, 250), (250, 450)]
        >>> slow_windows(100)
        [(15, 90)]
        >>> slow_windows(10)
        []
    """
    if warmup_steps < LEAST:
        return []
    start, size, end = START_BUFFER, FIRST_WINDOW, warmup_steps - END_BUFFER
    if warmup_steps < START_BUFFER + FIRST_WINDOW + END_BUFFER:
        start = int(0.15 * warmup_steps)
        end = warmup_steps - int(0.1 * warmup_steps)
        size = end - start
    windows = []
    while start < end:
        stop = start + size
        if stop + 2 * size > end:  # the next window would not fit: take what is left
            stop = end
        windows.append((start, stop))
        start, size = stop, 2 * size
    return windows


def growing_windows(warmup_steps: int) -> list[tuple[int, int]]:
    """Windows from the first steps on, for gradients, which tell before chains converge.

    Example:
        >>> growing_windows(300)
        [(8, 12), (12, 18), (18, 27), (27, 40), (40, 60), (60, 90), (90, 135), (135, 250)]
        >>> growing_windows(50)
        [(8, 12), (12, 18), (18, 27), (27, 40)]
        >>> growing_windows(10)
        []
    """
    if warmup_steps < LEAST:
        return []
    end = warmup_steps - min(END_BUFFER, warmup_steps // 5)
    windows, start = [], EARLIEST
    while start < end:
        stop = int(GROWTH * start)
        if GROWTH * stop > end + stop // 4:  # too little would be left for another window
            stop = end
        windows.append((start, stop))
        start = stop
    return windows

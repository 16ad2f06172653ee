"""Files: bounded readers, atomic writes, direct I/O (:mod:`.direct_io`), checksums, sizes as text."""

from megatron_ds.files.byte_text import checksum, gb
from megatron_ds.files.standard_output import print_line
from megatron_ds.files.whole_files import (
    MOST_BYTES,
    check_regular,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_object,
    read_text,
)
from megatron_ds.files.write import (
    replacing,
    sync_and_close,
    sync_directory,
    temporary_beside,
    write_json,
    write_text_durably,
)

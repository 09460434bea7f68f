"""Latency tables and the devices that jobs may name."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from store.errors import ConflictError, NotFoundError
from store.jobs import decode_cursor, encode_cursor, page_size
from store.models import Device, Table, is_storable_text
from store.records import DeviceRecord, TableRecord
from store.session import Database

logger = logging.getLogger(__name__)

_ID_BYTES = 8


class TableStore:
    """Methods of :class:`store.Store` about latency tables and devices."""

    _database: Database

    def save_table(
        self,
        document: Mapping[str, Any],
        *,
        name: str,
        device_name: str,
        fingerprint: str,
        block_key: str,
        runtime: str,
        dtype: str,
        batch_size: int,
        source: str,
    ) -> TableRecord:
        """Store a latency table; searches use the newest one of a key.

        Args:
            document: The LatencyTable, JSON.
            name: For people.
            device_name: For people.
            fingerprint: Of the device it was measured on.
            block_key: Of the blocks it covers.
            runtime: eager, compile, ...
            dtype: fp32, bf16, ...
            batch_size: Images per forward pass.
            source: Where it came from: a job id, import, push.
        """
        with self._database.write() as session:
            table = Table(
                id=secrets.token_hex(_ID_BYTES),
                name=name,
                device_name=device_name,
                fingerprint=fingerprint,
                block_key=block_key,
                runtime=runtime,
                dtype=dtype,
                batch_size=batch_size,
                source=source,
                document=dict(document),
                created_at=self._database.now(session),
            )
            session.add(table)
            session.flush()
            record = _table_record(table)
        logger.info("Stored a latency table", extra={"action": "save_table", "table_id": record.id, "source": source})
        return record

    def find_table(
        self, fingerprint: str, block_key: str, runtime: str, dtype: str, batch_size: int
    ) -> TableRecord | None:
        """Return the newest table of a device, kind of block and setting; None where there is none."""
        statement = (
            select(Table)
            .where(
                Table.fingerprint == fingerprint,
                Table.block_key == block_key,
                Table.runtime == runtime,
                Table.dtype == dtype,
                Table.batch_size == batch_size,
            )
            .order_by(Table.seq.desc())
            .limit(1)
        )
        with self._database.read() as session:
            table = session.scalars(statement).one_or_none()
            return None if table is None else _table_record(table)

    def get_table(self, table_id: str) -> TableRecord:
        """Return a table.

        Raises:
            NotFoundError: If there is none of that id.
        """
        table = None
        if is_storable_text(table_id):
            with self._database.read() as session:
                table = session.scalars(select(Table).where(Table.id == table_id)).one_or_none()
        if table is None:
            raise _no_table(table_id)
        return _table_record(table)

    def list_tables(self, limit: int = 50, cursor: str | None = None) -> tuple[list[TableRecord], str | None]:
        """List tables, newest first.

        Args:
            limit: Tables per page, brought into 1..500.
            cursor: Where the last page ended.

        Returns:
            The page, and the cursor of the next one or None at the end.

        Raises:
            InvalidCursorError: If the cursor was not handed out by this method.
        """
        statement = select(Table).order_by(Table.seq.desc())
        if cursor is not None:
            statement = statement.where(Table.seq < decode_cursor(cursor))
        size = page_size(limit)
        with self._database.read() as session:
            tables = list(session.scalars(statement.limit(size + 1)))
        next_cursor = encode_cursor(tables[size - 1].seq) if len(tables) > size else None
        return [_table_record(table) for table in tables[:size]], next_cursor

    def delete_table(self, table_id: str) -> None:
        """Delete a table; numbers predicted with it stay.

        Raises:
            NotFoundError: If there is none of that id.
        """
        found = None
        if is_storable_text(table_id):
            with self._database.write() as session:
                found = session.scalar(delete(Table).where(Table.id == table_id).returning(Table.id))
        if found is None:
            raise _no_table(table_id)

    def save_device(self, id: str, name: str, kind: str, info: Mapping[str, Any]) -> DeviceRecord:
        """Register a device, or update what is known about it.

        Args:
            id: What jobs call it.
            name: For people.
            kind: cpu, cuda, ...
            info: Its description, JSON.
        """
        try:
            return self._save_device(id, name, kind, info)
        except ConflictError as e:
            if not isinstance(e.__cause__, IntegrityError):
                raise
            # Two processes registered it for the first time at once; the second one now updates.
            return self._save_device(id, name, kind, info)

    def _save_device(self, id: str, name: str, kind: str, info: Mapping[str, Any]) -> DeviceRecord:
        with self._database.write() as session:
            now = self._database.now(session)
            device = session.get(Device, id)
            if device is None:
                device = Device(id=id, created_at=now)
                session.add(device)
            device.name = name
            device.kind = kind
            device.info = dict(info)
            device.updated_at = now
            session.flush()
            return _device_record(device)

    def list_devices(self) -> list[DeviceRecord]:
        """List all devices by id."""
        with self._database.read() as session:
            return [_device_record(device) for device in session.scalars(select(Device).order_by(Device.id))]

    def get_device(self, id: str) -> DeviceRecord:
        """Return a device.

        Raises:
            NotFoundError: If there is none of that id.
        """
        device = None
        if is_storable_text(id):
            with self._database.read() as session:
                device = session.get(Device, id)
        if device is None:
            raise NotFoundError(f"There is no device {id!r}. `prunefront devices` lists them.")
        return _device_record(device)


def _no_table(table_id: str) -> NotFoundError:
    return NotFoundError(f"There is no latency table {table_id!r}. List the latency tables to see which there are.")


def _table_record(row: Table) -> TableRecord:
    return TableRecord(
        id=row.id,
        name=row.name,
        device_name=row.device_name,
        fingerprint=row.fingerprint,
        block_key=row.block_key,
        runtime=row.runtime,
        dtype=row.dtype,
        batch_size=row.batch_size,
        source=row.source,
        document=row.document,
        created_at=row.created_at,
    )


def _device_record(row: Device) -> DeviceRecord:
    return DeviceRecord(
        id=row.id, name=row.name, kind=row.kind, info=row.info, created_at=row.created_at, updated_at=row.updated_at
    )

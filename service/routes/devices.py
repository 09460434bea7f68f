"""Devices that jobs may name."""

from __future__ import annotations

from fastapi import APIRouter, Response

from service.deps import StoreDep
from service.schemas import DeviceCreate, DevicePublic, Devices

router = APIRouter(prefix="/devices", tags=["catalog"])


@router.get("", summary="List devices")
def list_devices(store: StoreDep) -> Devices:
    return Devices(items=[DevicePublic.of(record) for record in store.list_devices()])


@router.post("", status_code=201, summary="Register a device")
def register_device(body: DeviceCreate, store: StoreDep, response: Response) -> DevicePublic:
    """Jobs for it wait until a controller offers it. Registering the same id again replaces what is known."""
    store.save_device(body.id, body.name, body.kind, body.info)
    response.headers["Location"] = "/api/v1/devices"
    return DevicePublic.of(store.get_device(body.id))
